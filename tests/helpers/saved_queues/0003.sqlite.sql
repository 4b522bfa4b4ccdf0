BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0003');
CREATE TABLE alias (
	name VARCHAR(256) NOT NULL, 
	alias VARCHAR(255) NOT NULL, 
	PRIMARY KEY (name, alias)
);
CREATE TABLE alias_move (
	id INTEGER NOT NULL, 
	name VARCHAR(256) NOT NULL, 
	alias VARCHAR(255) NOT NULL, 
	from_version INTEGER, 
	to_version INTEGER, 
	run_id VARCHAR(64), 
	reason TEXT NOT NULL, 
	moved_by VARCHAR(255) NOT NULL, 
	moved_at FLOAT NOT NULL, 
	PRIMARY KEY (id)
);
CREATE TABLE attempt (
	token VARCHAR(64) NOT NULL, 
	job_id INTEGER NOT NULL, 
	number INTEGER NOT NULL, 
	worker VARCHAR(255) NOT NULL, 
	host VARCHAR(255) NOT NULL, 
	pid INTEGER NOT NULL, 
	started_at FLOAT NOT NULL, 
	lease_until FLOAT NOT NULL, 
	progress JSON, 
	progress_at FLOAT, 
	ended_at FLOAT, 
	outcome VARCHAR(16), 
	error TEXT, 
	PRIMARY KEY (token), 
	FOREIGN KEY(job_id) REFERENCES job (id) ON DELETE CASCADE
);
INSERT INTO "attempt" VALUES('a5ddb72e8473c5f617e256b728518440',1,1,'old:1','old',1,1.79600364637899851802e+09,1.79600724637899851802e+09,NULL,NULL,1.796003646392999649e+09,'succeeded',NULL);
INSERT INTO "attempt" VALUES('121b30bac5d7699c20fd3a17126dd3f6',2,1,'old:1','old',1,1.79600364641001820562e+09,1.79600724641001820557e+09,NULL,NULL,1.79600364643999195098e+09,'fatal','loss is not finite
at step 3');
INSERT INTO "attempt" VALUES('9f75c53c948bb03d8ae25ef0bf95afa6',6,1,'old:1','old',1,1.79600364648098945619e+09,1.79600724648698425295e+09,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "attempt" VALUES('e055f1af15f55c6309b5ddd1740223a7',8,1,'old:1','old',1,1.79600364650098538394e+09,1.79600724650098538394e+09,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "attempt" VALUES('f0778ac6667d7bd9fa9a95489515a936',9,1,'old:1','old',1,1.79600364653699398048e+09,1.79600724653699398043e+09,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "attempt" VALUES('a0c43a9c70ab6a2e5eaa702313e851e1',10,1,'old:1','old',1,1.79600364656000733372e+09,1.79600724656000733372e+09,NULL,NULL,1.79600364656801366803e+09,'failed','crash');
INSERT INTO "attempt" VALUES('e4582b26da324bc652a305bcc411c51b',11,1,'old:1','old',1,1.7960036465890154839e+09,1.79600724658901548386e+09,NULL,NULL,1.79600364659098672868e+09,'preempted',NULL);
INSERT INTO "attempt" VALUES('ce46eedb94eb64caf24a35bed0c57727',12,1,'old:1','old',1,1.79600364658998107912e+09,1.79600724658998107908e+09,NULL,NULL,1.79600364659501028057e+09,'preempted',NULL);
INSERT INTO "attempt" VALUES('a6d1aec7b39cd99c43bfe398d81b360b',13,1,'old:1','old',1,1.79600364660800552365e+09,1.79600364560800552365e+09,NULL,NULL,1.79600364661098265642e+09,'lost',NULL);
CREATE TABLE job (
	id INTEGER NOT NULL, 
	kind VARCHAR(16) NOT NULL, 
	experiment VARCHAR(255) NOT NULL, 
	spec_hash VARCHAR(64) NOT NULL, 
	spec JSON NOT NULL, 
	state VARCHAR(16) NOT NULL, 
	pack_key VARCHAR(64), 
	pack_id VARCHAR(64), 
	token VARCHAR(64), 
	priority INTEGER DEFAULT '0' NOT NULL, 
	not_before FLOAT DEFAULT '0' NOT NULL, 
	attempts INTEGER DEFAULT '0' NOT NULL, 
	failures INTEGER DEFAULT '0' NOT NULL, 
	preemptions INTEGER DEFAULT '0' NOT NULL, 
	lost INTEGER DEFAULT '0' NOT NULL, 
	cancel_requested BOOLEAN DEFAULT 0 NOT NULL, 
	mlflow_run_id VARCHAR(64), 
	result JSON, 
	error TEXT, 
	created_at FLOAT NOT NULL, 
	updated_at FLOAT NOT NULL, held BOOLEAN DEFAULT 0 NOT NULL, checkpoint INTEGER DEFAULT '0' NOT NULL, cancelled_by INTEGER, 
	PRIMARY KEY (id), 
	CONSTRAINT uq_job_kind_spec_hash UNIQUE (kind, spec_hash), 
	UNIQUE (token)
);
INSERT INTO "job" VALUES(1,'train','saved','succeeded-hash','{"name": "succeeded", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}','succeeded','succeeded','c0817e3c52954d37a242f441f76cf8e3',NULL,0,0.0,1,0,0,0,0,'run-of-succeeded','{"model_uri": "models:/saved/1", "loss": 1.25}',NULL,1.796003646362985611e+09,1.79600364639400529856e+09,0,0,NULL);
INSERT INTO "job" VALUES(2,'train','saved','fatal-hash','{"name": "fatal", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}','failed','fatal','5b26290a993c4071b47844098074667c',NULL,0,0.0,1,1,0,0,0,NULL,NULL,'loss is not finite
at step 3',1.79600364640398311617e+09,1.79600364644099760053e+09,0,0,NULL);
INSERT INTO "job" VALUES(3,'evaluate','saved','waits-in-vain-hash','{"name": "waits-in-vain", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}','cancelled','waits-in-vain',NULL,NULL,0,0.0,0,0,0,0,0,NULL,NULL,'job 2 (train fatal-hash) failed',1.79600364641701889037e+09,1.79600364644900417328e+09,0,0,2);
INSERT INTO "job" VALUES(4,'predict','saved','waits-in-vain-too-hash','{"name": "waits-in-vain-too", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}','cancelled','waits-in-vain-too',NULL,NULL,0,0.0,0,0,0,0,0,NULL,NULL,'job 3 (evaluate waits-in-vai) was cancelled',1.79600364643299126622e+09,1.79600364645000982284e+09,0,0,3);
INSERT INTO "job" VALUES(5,'evaluate','saved','waits-for-succeeded-hash','{"name": "waits-for-succeeded", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}','queued','waits-for-succeeded',NULL,NULL,0,0.0,0,0,0,0,0,NULL,NULL,NULL,1.7960036464650168419e+09,1.7960036464650168419e+09,0,0,NULL);
INSERT INTO "job" VALUES(6,'train','saved','running-hash','{"name": "running", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}','running','running','e38eeeea8ad548db84fedc1e52d6a58e','9f75c53c948bb03d8ae25ef0bf95afa6',0,0.0,1,0,0,0,0,'run-of-running',NULL,NULL,1.79600364647600054738e+09,1.79600364648501276965e+09,0,0,NULL);
INSERT INTO "job" VALUES(7,'evaluate','saved','waits-for-running-hash','{"name": "waits-for-running", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}','queued','waits-for-running',NULL,NULL,0,0.0,0,0,0,0,0,NULL,NULL,NULL,1.79600364649499058718e+09,1.79600364649499058718e+09,0,0,NULL);
INSERT INTO "job" VALUES(8,'train','saved','asked-to-stop-hash','{"name": "asked-to-stop", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}','running','asked-to-stop','6c86910cdf7741b9b0af60629be783c1','e055f1af15f55c6309b5ddd1740223a7',0,0.0,1,0,0,0,1,NULL,NULL,NULL,1.79600364649901390076e+09,1796003646.50698,0,0,NULL);
INSERT INTO "job" VALUES(9,'train','saved','uploading-hash','{"name": "uploading", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}','uploading','uploading','db6ef646474b4c33aa18948d1a2527ec','f0778ac6667d7bd9fa9a95489515a936',0,0.0,1,0,0,0,0,NULL,'{"adapter": "checkpoints/x", "loss": 0.5}',NULL,1.79600364651800394055e+09,1.7960036465439944267e+09,0,0,NULL);
INSERT INTO "job" VALUES(10,'train','saved','failed-once-hash','{"name": "failed-once", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}','queued','failed-once','01c3df9508944e9da4ec63b7cf4c962b',NULL,0,1796003656.57598,1,1,0,0,0,NULL,NULL,'crash',1.79600364655598402022e+09,1796003646.57598,0,0,NULL);
INSERT INTO "job" VALUES(11,'train','saved','pack-a-hash','{"name": "pack-a", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}','queued','pair','d3b55576be394ab2a98caebc709b2aaf',NULL,0,1.79600364659400439258e+09,1,0,1,0,0,NULL,NULL,NULL,1.79600364658000326159e+09,1.79600364659400439258e+09,0,0,NULL);
INSERT INTO "job" VALUES(12,'train','saved','pack-b-hash','{"name": "pack-b", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}','queued','pair','d3b55576be394ab2a98caebc709b2aaf',NULL,0,1.79600364659698152544e+09,1,0,1,0,0,NULL,NULL,NULL,1.79600364658000326159e+09,1.79600364659698152544e+09,0,0,NULL);
INSERT INTO "job" VALUES(13,'train','saved','lost-hash','{"name": "lost", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}','queued','lost','d5c4b94cfa17401f9d1b5af9d1b05cb9',NULL,0,0.0,1,0,0,1,0,NULL,NULL,NULL,1.79600364660100483889e+09,1.7960036466129944325e+09,0,0,NULL);
INSERT INTO "job" VALUES(14,'train','saved','cancelled-hash','{"name": "cancelled", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}','cancelled','cancelled',NULL,NULL,0,0.0,0,0,0,0,0,NULL,NULL,NULL,1.79600364661400032045e+09,1.79600364661601185796e+09,0,0,NULL);
INSERT INTO "job" VALUES(15,'train','saved','urgent-hash','{"name": "urgent", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}','queued',NULL,NULL,NULL,5,0.0,0,0,0,0,0,NULL,NULL,NULL,1.79600364662401819227e+09,1.79600364662401819227e+09,0,0,NULL);
INSERT INTO "job" VALUES(16,'train','saved','plain-hash','{"name": "plain", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}','queued','plain',NULL,NULL,0,0.0,0,0,0,0,0,NULL,NULL,NULL,1.7960036466249837875e+09,1.7960036466249837875e+09,0,0,NULL);
INSERT INTO "job" VALUES(17,'train','saved','a6d189b1f924afb527c9c85054146a1d1069d55729fd61a7fee023082d7af986','{"arm": "{\"base_model\":\"org/base\",\"base_model_revision\":\"0123456789abcdef0123456789abcdef01234567\",\"quantization\":{\"load_in_4bit\":true,\"load_in_8bit\":false,\"bnb_4bit_quant_type\":\"nf4\",\"bnb_4bit_use_double_quant\":true,\"bnb_4bit_compute_dtype\":\"auto\"},\"lora\":{\"r\":8,\"lora_alpha\":16.0,\"lora_dropout\":0.05,\"target_modules\":[\"q_proj\",\"v_proj\"],\"use_rslora\":false},\"dataset\":{\"train\":\"org/rows\",\"train_revision\":\"0123456789abcdef0123456789abcdef01234567\",\"train_split\":\"train\",\"name\":null,\"eval\":{\"split_from\":\"train\",\"rows\":20,\"seed\":0},\"eval_revision\":null,\"eval_split\":\"test\",\"prompt\":\"How much is {carat}?\",\"completion\":\"${price}\",\"messages\":null,\"system\":null,\"chat_template\":null,\"chat_template_revision\":null,\"limit\":{\"train\":null,\"eval\":null}},\"training\":{\"max_steps\":20,\"num_train_epochs\":null,\"per_device_train_batch_size\":8,\"gradient_accumulation_steps\":1,\"learning_rate\":0.002,\"lr_scheduler_type\":\"cosine\",\"warmup_steps\":5.0,\"weight_decay\":0.0,\"adam_beta1\":0.9,\"adam_beta2\":0.999,\"adam_epsilon\":1e-8,\"max_grad_norm\":1.0,\"max_length\":1024,\"save_steps\":100,\"eval_steps\":null,\"logging_steps\":1,\"gradient_checkpointing\":false,\"optim\":\"adamw_torch_fused\",\"train_sampling_strategy\":\"random\"},\"seed\":0,\"init_from\":null,\"evaluation\":{\"metrics\":[\"loss\",\"number\"],\"primary_metric\":\"eval.loss\",\"max_new_tokens\":64,\"per_device_eval_batch_size\":8},\"checkpoint\":\"last\"}", "bare": false, "experiment": "saved", "experiment_id": "1", "parent_run_id": "run-of-sweep", "run_name": "lora.r=8", "register_as": "pricer", "log_examples": true, "definition": "version: 1\nname: small\nbase_model: org/base\nbase_model_revision: 0123456789abcdef0123456789abcdef01234567\nlora:\n  r: 8\n  lora_alpha: 2*r\n  lora_dropout: 0.05\n  target_modules: [q_proj, v_proj]\ndataset:\n  train: org/rows\n  train_revision: 0123456789abcdef0123456789abcdef01234567\n  eval: {split_from: train, rows: 20}\n  prompt: \"How much is {carat}?\"\n  completion: \"${price}\"\ntraining:\n  max_steps: 20\n  learning_rate: 2e-3\n  warmup_steps: 5\nsweep:\n  parameters:\n    lora.r: [4, 8]\nevaluation:\n  metrics: [loss, number]\n  primary_metric: eval.loss\nregister:\n  name: pricer\n  alias: best\n", "stops": [], "group": null, "command": "rankwise run small.yaml"}','queued','ca550a8ecfebb09a62a225fd32e2aba0cdd72fbaf2c25d94db6204b707806e17',NULL,NULL,0,0.0,0,0,0,0,0,NULL,NULL,NULL,1796003646.66401,1796003646.66401,0,0,NULL);
CREATE TABLE job_dependency (
	job_id INTEGER NOT NULL, 
	after_id INTEGER NOT NULL, 
	PRIMARY KEY (job_id, after_id), 
	FOREIGN KEY(job_id) REFERENCES job (id) ON DELETE CASCADE, 
	FOREIGN KEY(after_id) REFERENCES job (id) ON DELETE CASCADE
);
INSERT INTO "job_dependency" VALUES(3,2);
INSERT INTO "job_dependency" VALUES(4,3);
INSERT INTO "job_dependency" VALUES(4,1);
INSERT INTO "job_dependency" VALUES(5,1);
INSERT INTO "job_dependency" VALUES(7,6);
CREATE TABLE worker (
	name VARCHAR(255) NOT NULL, 
	host VARCHAR(255) NOT NULL, 
	pid INTEGER NOT NULL, 
	started_at FLOAT NOT NULL, 
	seen_at FLOAT NOT NULL, 
	info JSON NOT NULL, 
	PRIMARY KEY (name)
);
CREATE INDEX ix_job_experiment ON job (experiment, id);
CREATE INDEX ix_attempt_job ON attempt (job_id);
CREATE INDEX ix_attempt_open ON attempt (ended_at, lease_until);
CREATE INDEX ix_job_claim ON job (state, held, priority DESC, id);
CREATE INDEX ix_job_pack ON job (state, pack_key, pack_id, priority DESC, id);
CREATE INDEX ix_job_state ON job (state, kind, id);
CREATE INDEX ix_attempt_recent ON attempt (outcome, ended_at);
CREATE INDEX ix_dependency_after ON job_dependency (after_id, job_id);
CREATE INDEX ix_alias_move ON alias_move (name, alias, id);
COMMIT;
