SET statement_timeout = 0;
SET lock_timeout = 0;
SET idle_in_transaction_session_timeout = 0;
SET transaction_timeout = 0;
SET client_encoding = 'UTF8';
SET standard_conforming_strings = on;
SELECT pg_catalog.set_config('search_path', '', false);
SET check_function_bodies = false;
SET xmloption = content;
SET client_min_messages = warning;
SET row_security = off;
SET default_tablespace = '';
SET default_table_access_method = heap;
CREATE TABLE public.alembic_version (
    version_num character varying(32) NOT NULL
);
CREATE TABLE public.alias (
    name character varying(256) NOT NULL,
    alias character varying(255) NOT NULL
);
CREATE TABLE public.alias_move (
    id integer NOT NULL,
    name character varying(256) NOT NULL,
    alias character varying(255) NOT NULL,
    from_version integer,
    to_version integer,
    run_id character varying(64),
    reason text NOT NULL,
    moved_by character varying(255) NOT NULL,
    moved_at double precision NOT NULL
);
CREATE SEQUENCE public.alias_move_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.alias_move_id_seq OWNED BY public.alias_move.id;
CREATE TABLE public.attempt (
    token character varying(64) NOT NULL,
    job_id integer NOT NULL,
    number integer NOT NULL,
    worker character varying(255) NOT NULL,
    host character varying(255) NOT NULL,
    pid integer NOT NULL,
    started_at double precision NOT NULL,
    lease_until double precision NOT NULL,
    progress json,
    progress_at double precision,
    ended_at double precision,
    outcome character varying(16),
    error text
);
CREATE TABLE public.job (
    id integer NOT NULL,
    kind character varying(16) NOT NULL,
    experiment character varying(255) NOT NULL,
    spec_hash character varying(64) NOT NULL,
    spec json NOT NULL,
    state character varying(16) NOT NULL,
    pack_key character varying(64),
    pack_id character varying(64),
    token character varying(64),
    priority integer DEFAULT 0 NOT NULL,
    not_before double precision DEFAULT '0'::double precision NOT NULL,
    attempts integer DEFAULT 0 NOT NULL,
    failures integer DEFAULT 0 NOT NULL,
    preemptions integer DEFAULT 0 NOT NULL,
    lost integer DEFAULT 0 NOT NULL,
    cancel_requested boolean DEFAULT false NOT NULL,
    mlflow_run_id character varying(64),
    result json,
    error text,
    created_at double precision NOT NULL,
    updated_at double precision NOT NULL,
    held boolean DEFAULT false NOT NULL,
    checkpoint integer DEFAULT 0 NOT NULL,
    cancelled_by integer
);
CREATE TABLE public.job_dependency (
    job_id integer NOT NULL,
    after_id integer NOT NULL
);
CREATE SEQUENCE public.job_id_seq
    AS integer
    START WITH 1
    INCREMENT BY 1
    NO MINVALUE
    NO MAXVALUE
    CACHE 1;
ALTER SEQUENCE public.job_id_seq OWNED BY public.job.id;
CREATE TABLE public.worker (
    name character varying(255) NOT NULL,
    host character varying(255) NOT NULL,
    pid integer NOT NULL,
    started_at double precision NOT NULL,
    seen_at double precision NOT NULL,
    info json NOT NULL
);
ALTER TABLE ONLY public.alias_move ALTER COLUMN id SET DEFAULT nextval('public.alias_move_id_seq'::regclass);
ALTER TABLE ONLY public.job ALTER COLUMN id SET DEFAULT nextval('public.job_id_seq'::regclass);
INSERT INTO public.alembic_version VALUES ('0003');
INSERT INTO public.attempt VALUES ('19b2a5875386410ba0e9af036a0508ae', 1, 1, 'old:1', 'old', 1, 1796003650.623663, 1796007250.623665, NULL, NULL, 1796003650.63192, 'succeeded', NULL);
INSERT INTO public.attempt VALUES ('81ddd8d7d9604b0badcfab863b68d6b4', 2, 1, 'old:1', 'old', 1, 1796003650.650283, 1796007250.650285, NULL, NULL, 1796003650.691984, 'fatal', 'loss is not finite
at step 3');
INSERT INTO public.attempt VALUES ('c8e987db0b024aa9bd0fee4f52cb5086', 6, 1, 'old:1', 'old', 1, 1796003650.72788, 1796007250.733411, NULL, NULL, NULL, NULL, NULL);
INSERT INTO public.attempt VALUES ('323b646d12c9410aa3bed300e4f42452', 8, 1, 'old:1', 'old', 1, 1796003650.754883, 1796007250.754885, NULL, NULL, NULL, NULL, NULL);
INSERT INTO public.attempt VALUES ('dfba6e9bee724a0db8b54fd01f3316fb', 9, 1, 'old:1', 'old', 1, 1796003650.79598, 1796007250.795985, NULL, NULL, NULL, NULL, NULL);
INSERT INTO public.attempt VALUES ('891bb07ee1184592b761d415cbf3c21f', 10, 1, 'old:1', 'old', 1, 1796003650.83988, 1796007250.839883, NULL, NULL, 1796003650.844804, 'failed', 'crash');
INSERT INTO public.attempt VALUES ('9cf68c6f56aa4a34b560ab0e252b89aa', 11, 1, 'old:1', 'old', 1, 1796003650.882925, 1796007250.882928, NULL, NULL, 1796003650.900037, 'preempted', NULL);
INSERT INTO public.attempt VALUES ('e6f7f04bf4184a66af398937b72824b9', 12, 1, 'old:1', 'old', 1, 1796003650.883346, 1796007250.883347, NULL, NULL, 1796003650.912893, 'preempted', NULL);
INSERT INTO public.attempt VALUES ('f391e0e30aee4018b6e93c3b8dc5fbda', 13, 1, 'old:1', 'old', 1, 1796003650.940538, 1796003649.940541, NULL, NULL, 1796003650.952393, 'lost', NULL);
INSERT INTO public.job VALUES (1, 'train', 'saved', 'succeeded-hash', '{"name": "succeeded", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}', 'succeeded', 'succeeded', 'd893d2945195423f966963a92a17a058', NULL, 0, 0, 1, 0, 0, 0, false, 'run-of-succeeded', '{"model_uri": "models:/saved/1", "loss": 1.25}', NULL, 1796003650.607328, 1796003650.634244, false, 0, NULL);
INSERT INTO public.job VALUES (2, 'train', 'saved', 'fatal-hash', '{"name": "fatal", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}', 'failed', 'fatal', 'dc1168bfd26146699fc5d01d0b0b5b98', NULL, 0, 0, 1, 1, 0, 0, false, NULL, NULL, 'loss is not finite
at step 3', 1796003650.640737, 1796003650.693409, false, 0, NULL);
INSERT INTO public.job VALUES (3, 'evaluate', 'saved', 'waits-in-vain-hash', '{"name": "waits-in-vain", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}', 'cancelled', 'waits-in-vain', NULL, NULL, 0, 0, 0, 0, 0, 0, false, NULL, NULL, 'job 2 (train fatal-hash) failed', 1796003650.653066, 1796003650.69701, false, 0, 2);
INSERT INTO public.job VALUES (4, 'predict', 'saved', 'waits-in-vain-too-hash', '{"name": "waits-in-vain-too", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}', 'cancelled', 'waits-in-vain-too', NULL, NULL, 0, 0, 0, 0, 0, 0, false, NULL, NULL, 'job 3 (evaluate waits-in-vai) was cancelled', 1796003650.675335, 1796003650.702704, false, 0, 3);
INSERT INTO public.job VALUES (5, 'evaluate', 'saved', 'waits-for-succeeded-hash', '{"name": "waits-for-succeeded", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}', 'queued', 'waits-for-succeeded', NULL, NULL, 0, 0, 0, 0, 0, 0, false, NULL, NULL, NULL, 1796003650.713189, 1796003650.713193, false, 0, NULL);
INSERT INTO public.job VALUES (6, 'train', 'saved', 'running-hash', '{"name": "running", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}', 'running', 'running', 'b3484efb08684c43bb6d89893d17e0b3', 'c8e987db0b024aa9bd0fee4f52cb5086', 0, 0, 1, 0, 0, 0, false, 'run-of-running', NULL, NULL, 1796003650.7203, 1796003650.732119, false, 0, NULL);
INSERT INTO public.job VALUES (7, 'evaluate', 'saved', 'waits-for-running-hash', '{"name": "waits-for-running", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}', 'queued', 'waits-for-running', NULL, NULL, 0, 0, 0, 0, 0, 0, false, NULL, NULL, NULL, 1796003650.74035, 1796003650.740354, false, 0, NULL);
INSERT INTO public.job VALUES (8, 'train', 'saved', 'asked-to-stop-hash', '{"name": "asked-to-stop", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}', 'running', 'asked-to-stop', 'd0f58761d507424caaec86c0cfa3cc0b', '323b646d12c9410aa3bed300e4f42452', 0, 0, 1, 0, 0, 0, true, NULL, NULL, NULL, 1796003650.747818, 1796003650.765693, false, 0, NULL);
INSERT INTO public.job VALUES (9, 'train', 'saved', 'uploading-hash', '{"name": "uploading", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}', 'uploading', 'uploading', '1b41b7e658414407b10b64f1760ffe17', 'dfba6e9bee724a0db8b54fd01f3316fb', 0, 0, 1, 0, 0, 0, false, NULL, '{"adapter": "checkpoints/x", "loss": 0.5}', NULL, 1796003650.775541, 1796003650.80947, false, 0, NULL);
INSERT INTO public.job VALUES (10, 'train', 'saved', 'failed-once-hash', '{"name": "failed-once", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}', 'queued', 'failed-once', '12c906c3f9f140a4a209f0dbfd8579c8', NULL, 0, 1796003660.849531, 1, 1, 0, 0, false, NULL, NULL, 'crash', 1796003650.818296, 1796003650.849536, false, 0, NULL);
INSERT INTO public.job VALUES (11, 'train', 'saved', 'pack-a-hash', '{"name": "pack-a", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}', 'queued', 'pair', '465f84e1560c4f139ce21176d86b9ce1', NULL, 0, 1796003650.90242, 1, 0, 1, 0, false, NULL, NULL, NULL, 1796003650.856269, 1796003650.902422, false, 0, NULL);
INSERT INTO public.job VALUES (12, 'train', 'saved', 'pack-b-hash', '{"name": "pack-b", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}', 'queued', 'pair', '465f84e1560c4f139ce21176d86b9ce1', NULL, 0, 1796003650.914255, 1, 0, 1, 0, false, NULL, NULL, NULL, 1796003650.856352, 1796003650.914258, false, 0, NULL);
INSERT INTO public.job VALUES (13, 'train', 'saved', 'lost-hash', '{"name": "lost", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}', 'queued', 'lost', 'c75a95e0018c4ad49377aa8e347f8136', NULL, 0, 0, 1, 0, 0, 1, false, NULL, NULL, NULL, 1796003650.924545, 1796003650.95443, false, 0, NULL);
INSERT INTO public.job VALUES (14, 'train', 'saved', 'cancelled-hash', '{"name": "cancelled", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}', 'cancelled', 'cancelled', NULL, NULL, 0, 0, 0, 0, 0, 0, false, NULL, NULL, NULL, 1796003650.964706, 1796003650.97211, false, 0, NULL);
INSERT INTO public.job VALUES (15, 'train', 'saved', 'urgent-hash', '{"name": "urgent", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}', 'queued', NULL, NULL, NULL, 5, 0, 0, 0, 0, 0, false, NULL, NULL, NULL, 1796003650.988578, 1796003650.98859, false, 0, NULL);
INSERT INTO public.job VALUES (16, 'train', 'saved', 'plain-hash', '{"name": "plain", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}', 'queued', 'plain', NULL, NULL, 0, 0, 0, 0, 0, 0, false, NULL, NULL, NULL, 1796003651.000541, 1796003651.00055, false, 0, NULL);
INSERT INTO public.job VALUES (17, 'train', 'saved', 'a6d189b1f924afb527c9c85054146a1d1069d55729fd61a7fee023082d7af986', '{"arm": "{\"base_model\":\"org/base\",\"base_model_revision\":\"0123456789abcdef0123456789abcdef01234567\",\"quantization\":{\"load_in_4bit\":true,\"load_in_8bit\":false,\"bnb_4bit_quant_type\":\"nf4\",\"bnb_4bit_use_double_quant\":true,\"bnb_4bit_compute_dtype\":\"auto\"},\"lora\":{\"r\":8,\"lora_alpha\":16.0,\"lora_dropout\":0.05,\"target_modules\":[\"q_proj\",\"v_proj\"],\"use_rslora\":false},\"dataset\":{\"train\":\"org/rows\",\"train_revision\":\"0123456789abcdef0123456789abcdef01234567\",\"train_split\":\"train\",\"name\":null,\"eval\":{\"split_from\":\"train\",\"rows\":20,\"seed\":0},\"eval_revision\":null,\"eval_split\":\"test\",\"prompt\":\"How much is {carat}?\",\"completion\":\"${price}\",\"messages\":null,\"system\":null,\"chat_template\":null,\"chat_template_revision\":null,\"limit\":{\"train\":null,\"eval\":null}},\"training\":{\"max_steps\":20,\"num_train_epochs\":null,\"per_device_train_batch_size\":8,\"gradient_accumulation_steps\":1,\"learning_rate\":0.002,\"lr_scheduler_type\":\"cosine\",\"warmup_steps\":5.0,\"weight_decay\":0.0,\"adam_beta1\":0.9,\"adam_beta2\":0.999,\"adam_epsilon\":1e-8,\"max_grad_norm\":1.0,\"max_length\":1024,\"save_steps\":100,\"eval_steps\":null,\"logging_steps\":1,\"gradient_checkpointing\":false,\"optim\":\"adamw_torch_fused\",\"train_sampling_strategy\":\"random\"},\"seed\":0,\"init_from\":null,\"evaluation\":{\"metrics\":[\"loss\",\"number\"],\"primary_metric\":\"eval.loss\",\"max_new_tokens\":64,\"per_device_eval_batch_size\":8},\"checkpoint\":\"last\"}", "bare": false, "experiment": "saved", "experiment_id": "1", "parent_run_id": "run-of-sweep", "run_name": "lora.r=8", "register_as": "pricer", "log_examples": true, "definition": "version: 1\nname: small\nbase_model: org/base\nbase_model_revision: 0123456789abcdef0123456789abcdef01234567\nlora:\n  r: 8\n  lora_alpha: 2*r\n  lora_dropout: 0.05\n  target_modules: [q_proj, v_proj]\ndataset:\n  train: org/rows\n  train_revision: 0123456789abcdef0123456789abcdef01234567\n  eval: {split_from: train, rows: 20}\n  prompt: \"How much is {carat}?\"\n  completion: \"${price}\"\ntraining:\n  max_steps: 20\n  learning_rate: 2e-3\n  warmup_steps: 5\nsweep:\n  parameters:\n    lora.r: [4, 8]\nevaluation:\n  metrics: [loss, number]\n  primary_metric: eval.loss\nregister:\n  name: pricer\n  alias: best\n", "stops": [], "group": null, "command": "rankwise run small.yaml"}', 'queued', 'ca550a8ecfebb09a62a225fd32e2aba0cdd72fbaf2c25d94db6204b707806e17', NULL, NULL, 0, 0, 0, 0, 0, 0, false, NULL, NULL, NULL, 1796003651.017909, 1796003651.01792, false, 0, NULL);
INSERT INTO public.job_dependency VALUES (3, 2);
INSERT INTO public.job_dependency VALUES (4, 3);
INSERT INTO public.job_dependency VALUES (4, 1);
INSERT INTO public.job_dependency VALUES (5, 1);
INSERT INTO public.job_dependency VALUES (7, 6);
SELECT pg_catalog.setval('public.alias_move_id_seq', 1, false);
SELECT pg_catalog.setval('public.job_id_seq', 17, true);
ALTER TABLE ONLY public.alembic_version
    ADD CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num);
ALTER TABLE ONLY public.alias_move
    ADD CONSTRAINT alias_move_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.alias
    ADD CONSTRAINT alias_pkey PRIMARY KEY (name, alias);
ALTER TABLE ONLY public.attempt
    ADD CONSTRAINT attempt_pkey PRIMARY KEY (token);
ALTER TABLE ONLY public.job_dependency
    ADD CONSTRAINT job_dependency_pkey PRIMARY KEY (job_id, after_id);
ALTER TABLE ONLY public.job
    ADD CONSTRAINT job_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.job
    ADD CONSTRAINT job_token_key UNIQUE (token);
ALTER TABLE ONLY public.job
    ADD CONSTRAINT uq_job_kind_spec_hash UNIQUE (kind, spec_hash);
ALTER TABLE ONLY public.worker
    ADD CONSTRAINT worker_pkey PRIMARY KEY (name);
CREATE INDEX ix_alias_move ON public.alias_move USING btree (name, alias, id);
CREATE INDEX ix_attempt_job ON public.attempt USING btree (job_id);
CREATE INDEX ix_attempt_open ON public.attempt USING btree (ended_at, lease_until);
CREATE INDEX ix_attempt_recent ON public.attempt USING btree (outcome, ended_at);
CREATE INDEX ix_dependency_after ON public.job_dependency USING btree (after_id, job_id);
CREATE INDEX ix_job_claim ON public.job USING btree (state, held, priority DESC, id);
CREATE INDEX ix_job_experiment ON public.job USING btree (experiment, id);
CREATE INDEX ix_job_pack ON public.job USING btree (state, pack_key, pack_id, priority DESC, id);
CREATE INDEX ix_job_state ON public.job USING btree (state, kind, id);
ALTER TABLE ONLY public.attempt
    ADD CONSTRAINT attempt_job_id_fkey FOREIGN KEY (job_id) REFERENCES public.job(id) ON DELETE CASCADE;
ALTER TABLE ONLY public.job_dependency
    ADD CONSTRAINT job_dependency_after_id_fkey FOREIGN KEY (after_id) REFERENCES public.job(id) ON DELETE CASCADE;
ALTER TABLE ONLY public.job_dependency
    ADD CONSTRAINT job_dependency_job_id_fkey FOREIGN KEY (job_id) REFERENCES public.job(id) ON DELETE CASCADE;
