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
    updated_at double precision NOT NULL
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
ALTER TABLE ONLY public.job ALTER COLUMN id SET DEFAULT nextval('public.job_id_seq'::regclass);
INSERT INTO public.alembic_version VALUES ('0001');
INSERT INTO public.attempt VALUES ('17b031293b7e4b888bb11f4ee4897b7d', 1, 1, 'old:1', 'old', 1, 1795553579.20658, 1795557179.20659, NULL, NULL, 1795553579.221731, 'succeeded', NULL);
INSERT INTO public.attempt VALUES ('2688e40107d840179348dc84c3787c9a', 2, 1, 'old:1', 'old', 1, 1795553579.237958, 1795557179.237964, NULL, NULL, 1795553579.265608, 'fatal', 'loss is not finite
at step 3');
INSERT INTO public.attempt VALUES ('ece64c3c49804152b43ce383452b32b7', 6, 1, 'old:1', 'old', 1, 1795553579.286964, 1795557179.296007, '{"step": 7}', 1795553579.296022, NULL, NULL, NULL);
INSERT INTO public.attempt VALUES ('83db4a042aa64bebb233340c29b17269', 8, 1, 'old:1', 'old', 1, 1795553579.316521, 1795557179.31653, NULL, NULL, NULL, NULL, NULL);
INSERT INTO public.attempt VALUES ('6a2289989a18498d8caf07b813f8cfc9', 9, 1, 'old:1', 'old', 1, 1795553579.346904, 1795557179.346911, NULL, NULL, NULL, NULL, NULL);
INSERT INTO public.attempt VALUES ('489194fc2343401e892fc9986487d675', 10, 1, 'old:1', 'old', 1, 1795553579.364674, 1795557179.364681, NULL, NULL, 1795553579.371954, 'failed', 'crash');
INSERT INTO public.attempt VALUES ('da157c86b9394bb0ab548f34df3c24e3', 11, 1, 'old:1', 'old', 1, 1795553579.393026, 1795557179.393031, NULL, NULL, 1795553579.401367, 'preempted', NULL);
INSERT INTO public.attempt VALUES ('f0d915597c994400a857a029a65ef541', 12, 1, 'old:1', 'old', 1, 1795553579.394169, 1795557179.394174, NULL, NULL, 1795553579.407907, 'preempted', NULL);
INSERT INTO public.attempt VALUES ('ab4e99dbd65249b5af85695ee2f48213', 13, 1, 'old:1', 'old', 1, 1795553579.420885, 1795553578.420893, NULL, NULL, 1795553579.432589, 'lost', NULL);
INSERT INTO public.job VALUES (1, 'train', 'saved', 'succeeded-hash', '{"name": "succeeded", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}', 'succeeded', 'succeeded', 'dc0b953c7adb4ca59b1de067b3ca1092', NULL, 0, 0, 1, 0, 0, 0, false, 'run-of-succeeded', '{"model_uri": "models:/saved/1", "loss": 1.25}', NULL, 1795553579.178901, 1795553579.219439);
INSERT INTO public.job VALUES (3, 'evaluate', 'saved', 'waits-in-vain-hash', '{"name": "waits-in-vain", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}', 'queued', 'waits-in-vain', NULL, NULL, 0, 0, 0, 0, 0, 0, false, NULL, NULL, NULL, 1795553579.241902, 1795553579.241914);
INSERT INTO public.job VALUES (4, 'predict', 'saved', 'waits-in-vain-too-hash', '{"name": "waits-in-vain-too", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}', 'queued', 'waits-in-vain-too', NULL, NULL, 0, 0, 0, 0, 0, 0, false, NULL, NULL, NULL, 1795553579.253952, 1795553579.253964);
INSERT INTO public.job VALUES (2, 'train', 'saved', 'fatal-hash', '{"name": "fatal", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}', 'failed', 'fatal', '130429d9652b408a83318cd3d347bf04', NULL, 0, 0, 1, 1, 0, 0, false, NULL, NULL, 'loss is not finite
at step 3', 1795553579.225559, 1795553579.264145);
INSERT INTO public.job VALUES (5, 'evaluate', 'saved', 'waits-for-succeeded-hash', '{"name": "waits-for-succeeded", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}', 'queued', 'waits-for-succeeded', NULL, NULL, 0, 0, 0, 0, 0, 0, false, NULL, NULL, NULL, 1795553579.269026, 1795553579.269035);
INSERT INTO public.job VALUES (6, 'train', 'saved', 'running-hash', '{"name": "running", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}', 'running', 'running', '823d96f7a0694234874b53c6b84ecdc5', 'ece64c3c49804152b43ce383452b32b7', 0, 0, 1, 0, 0, 0, false, 'run-of-running', NULL, NULL, 1795553579.275157, 1795553579.289885);
INSERT INTO public.job VALUES (7, 'evaluate', 'saved', 'waits-for-running-hash', '{"name": "waits-for-running", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}', 'queued', 'waits-for-running', NULL, NULL, 0, 0, 0, 0, 0, 0, false, NULL, NULL, NULL, 1795553579.299433, 1795553579.299444);
INSERT INTO public.job VALUES (8, 'train', 'saved', 'asked-to-stop-hash', '{"name": "asked-to-stop", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}', 'running', 'asked-to-stop', 'e50b579534414564875a0df2980a755e', '83db4a042aa64bebb233340c29b17269', 0, 0, 1, 0, 0, 0, true, NULL, NULL, NULL, 1795553579.305112, 1795553579.323358);
INSERT INTO public.job VALUES (9, 'train', 'saved', 'uploading-hash', '{"name": "uploading", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}', 'uploading', 'uploading', 'f1a0c400e73b43a6bcc80b6dfb2305d3', '6a2289989a18498d8caf07b813f8cfc9', 0, 0, 1, 0, 0, 0, false, NULL, '{"adapter": "checkpoints/x", "loss": 0.5}', NULL, 1795553579.330516, 1795553579.351397);
INSERT INTO public.job VALUES (10, 'train', 'saved', 'failed-once-hash', '{"name": "failed-once", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}', 'queued', 'failed-once', 'ea134d0f434c4aab9993b55c514423a3', NULL, 0, 1795553589.370631, 1, 1, 0, 0, false, NULL, NULL, 'crash', 1795553579.354352, 1795553579.370642);
INSERT INTO public.job VALUES (11, 'train', 'saved', 'pack-a-hash', '{"name": "pack-a", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}', 'queued', 'pair', '07ba63cfad4741129f114bd4a77efbd8', NULL, 0, 0, 1, 0, 1, 0, false, NULL, NULL, NULL, 1795553579.376113, 1795553579.400091);
INSERT INTO public.job VALUES (12, 'train', 'saved', 'pack-b-hash', '{"name": "pack-b", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}', 'queued', 'pair', '07ba63cfad4741129f114bd4a77efbd8', NULL, 0, 0, 1, 0, 1, 0, false, NULL, NULL, NULL, 1795553579.376209, 1795553579.406631);
INSERT INTO public.job VALUES (13, 'train', 'saved', 'lost-hash', '{"name": "lost", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}', 'queued', 'lost', 'bb0003e50e59456586a8f29abab298de', NULL, 0, 0, 1, 0, 0, 1, false, NULL, NULL, NULL, 1795553579.411096, 1795553579.429997);
INSERT INTO public.job VALUES (14, 'train', 'saved', 'cancelled-hash', '{"name": "cancelled", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}', 'cancelled', 'cancelled', NULL, NULL, 0, 0, 0, 0, 0, 0, false, NULL, NULL, NULL, 1795553579.43591, 1795553579.440115);
INSERT INTO public.job VALUES (15, 'train', 'saved', 'urgent-hash', '{"name": "urgent", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}', 'queued', NULL, NULL, NULL, 5, 0, 0, 0, 0, 0, false, NULL, NULL, NULL, 1795553579.44592, 1795553579.445934);
INSERT INTO public.job VALUES (16, 'train', 'saved', 'plain-hash', '{"name": "plain", "text": "Gr\u00f6\u00dfe \u00d7 3, \u201equoted\u201c, it''s ''so'' \\ {} %", "rate": 0.002, "none": null, "list": [1, []]}', 'queued', 'plain', NULL, NULL, 0, 0, 0, 0, 0, 0, false, NULL, NULL, NULL, 1795553579.4499, 1795553579.44991);
INSERT INTO public.job_dependency VALUES (3, 2);
INSERT INTO public.job_dependency VALUES (4, 3);
INSERT INTO public.job_dependency VALUES (4, 1);
INSERT INTO public.job_dependency VALUES (5, 1);
INSERT INTO public.job_dependency VALUES (7, 6);
SELECT pg_catalog.setval('public.job_id_seq', 16, true);
ALTER TABLE ONLY public.alembic_version
    ADD CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num);
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
CREATE INDEX ix_attempt_job ON public.attempt USING btree (job_id);
CREATE INDEX ix_attempt_open ON public.attempt USING btree (ended_at, lease_until);
CREATE INDEX ix_job_claim ON public.job USING btree (state, priority, id);
CREATE INDEX ix_job_experiment ON public.job USING btree (experiment, id);
CREATE INDEX ix_job_pack ON public.job USING btree (state, pack_key, pack_id);
ALTER TABLE ONLY public.attempt
    ADD CONSTRAINT attempt_job_id_fkey FOREIGN KEY (job_id) REFERENCES public.job(id) ON DELETE CASCADE;
ALTER TABLE ONLY public.job_dependency
    ADD CONSTRAINT job_dependency_after_id_fkey FOREIGN KEY (after_id) REFERENCES public.job(id) ON DELETE CASCADE;
ALTER TABLE ONLY public.job_dependency
    ADD CONSTRAINT job_dependency_job_id_fkey FOREIGN KEY (job_id) REFERENCES public.job(id) ON DELETE CASCADE;
