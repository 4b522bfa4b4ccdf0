BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0001');
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
INSERT INTO "attempt" VALUES('62cf630428b4a125be2cc928d6a28564',1,1,'old:1','old',1,1.79555357723299121859e+09,1.79555717723299121859e+09,NULL,NULL,1.79555357724200344085e+09,'succeeded',NULL);
INSERT INTO "attempt" VALUES('e498b5cccc8db13adbacddfcbae9e535',2,1,'old:1','old',1,1.79555357725198125838e+09,1.79555717725198125834e+09,NULL,NULL,1.79555357727101135251e+09,'fatal','loss is not finite
at step 3');
INSERT INTO "attempt" VALUES('4a9284d115120380f9bed8dd5ad6e299',6,1,'old:1','old',1,1.79555357728601837157e+09,1.79555717729398465155e+09,'{"step": 7}',1.79555357729398465155e+09,NULL,NULL,NULL);
INSERT INTO "attempt" VALUES('224aada7833a24b7de1268a4c7f202fd',8,1,'old:1','old',1,1795553577.30698,1795557177.30698,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "attempt" VALUES('cc6410f05141ba01ca6760fc720a39bc',9,1,'old:1','old',1,1.79555357732399845129e+09,1.79555717732399845124e+09,NULL,NULL,NULL,NULL,NULL);
INSERT INTO "attempt" VALUES('c150a46880157c717a94b9315d24c2c4',10,1,'old:1','old',1,1.79555357734101724625e+09,1.79555717734101724625e+09,NULL,NULL,1.79555357734701180453e+09,'failed','crash');
INSERT INTO "attempt" VALUES('d65c05fe91d76bfb82fa7d99285e55c8',11,1,'old:1','old',1,1.7955535773620188236e+09,1.7955571773620188236e+09,NULL,NULL,1.7955535773680136204e+09,'preempted',NULL);
INSERT INTO "attempt" VALUES('a5179772ec276dcb8103dfdab5eca195',12,1,'old:1','old',1,1.79555357736298441882e+09,1.79555717736298441891e+09,NULL,NULL,1.79555357737099075313e+09,'preempted',NULL);
INSERT INTO "attempt" VALUES('ab45d41e1e6d91f34791c11f79c4452f',13,1,'old:1','old',1,1.79555357737899732584e+09,1.79555357637899732584e+09,NULL,NULL,1.79555357738998079301e+09,'lost',NULL);
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
	updated_at FLOAT NOT NULL, 
	PRIMARY KEY (id), 
	CONSTRAINT uq_job_kind_spec_hash UNIQUE (kind, spec_hash), 
	UNIQUE (token)
);
INSERT INTO "job" VALUES(1,'train','saved','succeeded-hash','{"name": "succeeded", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}','succeeded','succeeded','e5b4c1951cb6448e818f44f0bc88db69',NULL,0,0.0,1,0,0,0,0,'run-of-succeeded','{"model_uri": "models:/saved/1", "loss": 1.25}',NULL,1.79555357720800638204e+09,1.79555357723999166495e+09);
INSERT INTO "job" VALUES(2,'train','saved','fatal-hash','{"name": "fatal", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}','failed','fatal','f590c60c31494a87a992cf787c1d6d4f',NULL,0,0.0,1,1,0,0,0,NULL,NULL,'loss is not finite
at step 3',1.79555357724498057363e+09,1.79555357727101135251e+09);
INSERT INTO "job" VALUES(3,'evaluate','saved','waits-in-vain-hash','{"name": "waits-in-vain", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}','queued','waits-in-vain',NULL,NULL,0,0.0,0,0,0,0,0,NULL,NULL,NULL,1.79555357725600457183e+09,1.79555357725600457183e+09);
INSERT INTO "job" VALUES(4,'predict','saved','waits-in-vain-too-hash','{"name": "waits-in-vain-too", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}','queued','waits-in-vain-too',NULL,NULL,0,0.0,0,0,0,0,0,NULL,NULL,NULL,1.79555357726401090615e+09,1.79555357726401090615e+09);
INSERT INTO "job" VALUES(5,'evaluate','saved','waits-for-succeeded-hash','{"name": "waits-for-succeeded", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}','queued','waits-for-succeeded',NULL,NULL,0,0.0,0,0,0,0,0,NULL,NULL,NULL,1.79555357727398872376e+09,1.79555357727398872376e+09);
INSERT INTO "job" VALUES(6,'train','saved','running-hash','{"name": "running", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}','running','running','2466ee8d4a904461bfb0a464eea0ebc6','4a9284d115120380f9bed8dd5ad6e299',0,0.0,1,0,0,0,0,'run-of-running',NULL,NULL,1.79555357727801203726e+09,1.79555357728798985475e+09);
INSERT INTO "job" VALUES(7,'evaluate','saved','waits-for-running-hash','{"name": "waits-for-running", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}','queued','waits-for-running',NULL,NULL,0,0.0,0,0,0,0,0,NULL,NULL,NULL,1.79555357729599618906e+09,1.79555357729599618906e+09);
INSERT INTO "job" VALUES(8,'train','saved','asked-to-stop-hash','{"name": "asked-to-stop", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}','running','asked-to-stop','2fa82fd6eacf4d9a9ea9771c81202d2e','224aada7833a24b7de1268a4c7f202fd',0,0.0,1,0,0,0,1,NULL,NULL,NULL,1.79555357730001950268e+09,1.79555357731100320812e+09);
INSERT INTO "job" VALUES(9,'train','saved','uploading-hash','{"name": "uploading", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}','uploading','uploading','49d2bd1b98f5460da0b43ea6f2d91217','cc6410f05141ba01ca6760fc720a39bc',0,0.0,1,0,0,0,0,NULL,'{"adapter": "checkpoints/x", "loss": 0.5}',NULL,1.79555357731599211697e+09,1.79555357732701587674e+09);
INSERT INTO "job" VALUES(10,'train','saved','failed-once-hash','{"name": "failed-once", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}','queued','failed-once','d8297f95d11b43a79538afd18366c655',NULL,0,1.79555358734600591661e+09,1,1,0,0,0,NULL,NULL,'crash',1.79555357732898735996e+09,1.79555357734600591658e+09);
INSERT INTO "job" VALUES(11,'train','saved','pack-a-hash','{"name": "pack-a", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}','queued','pair','3278b9cf9fd54f19bccd2ce790c62fd3',NULL,0,0.0,1,0,1,0,0,NULL,NULL,NULL,1.79555357734998917579e+09,1.7955535773670077324e+09);
INSERT INTO "job" VALUES(12,'train','saved','pack-b-hash','{"name": "pack-b", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}','queued','pair','3278b9cf9fd54f19bccd2ce790c62fd3',NULL,0,0.0,1,0,1,0,0,NULL,NULL,NULL,1.79555357734998917579e+09,1.79555357736998510357e+09);
INSERT INTO "job" VALUES(13,'train','saved','lost-hash','{"name": "lost", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}','queued','lost','7a0b10c375c74f9aa74dddaa256959a1',NULL,0,0.0,1,0,0,1,0,NULL,NULL,NULL,1.79555357737300252916e+09,1.79555357738800954814e+09);
INSERT INTO "job" VALUES(14,'train','saved','cancelled-hash','{"name": "cancelled", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}','cancelled','cancelled',NULL,NULL,0,0.0,0,0,0,0,0,NULL,NULL,NULL,1.79555357739299821856e+09,1.79555357739601588245e+09);
INSERT INTO "job" VALUES(15,'train','saved','urgent-hash','{"name": "urgent", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}','queued',NULL,NULL,NULL,5,0.0,0,0,0,0,0,NULL,NULL,NULL,1.79555357739999890331e+09,1.79555357739999890331e+09);
INSERT INTO "job" VALUES(16,'train','saved','plain-hash','{"name": "plain", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}','queued','plain',NULL,NULL,0,0.0,0,0,0,0,0,NULL,NULL,NULL,1.79555357740301632877e+09,1.79555357740301632877e+09);
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
CREATE INDEX ix_job_claim ON job (state, priority, id);
CREATE INDEX ix_job_pack ON job (state, pack_key, pack_id);
CREATE INDEX ix_job_experiment ON job (experiment, id);
CREATE INDEX ix_attempt_job ON attempt (job_id);
CREATE INDEX ix_attempt_open ON attempt (ended_at, lease_until);
COMMIT;
