-- The team's databases and their users: the queue's and MLflow's. PostgreSQL's image runs this on an empty volume; it
-- may be run again, which sets the passwords to those of the environment (the way to change one):
--   docker compose up --detach postgres
--   docker compose exec postgres psql -v ON_ERROR_STOP=1 -f /docker-entrypoint-initdb.d/postgres.sql
\getenv queue_password RANKWISE_DB_PASSWORD
\getenv mlflow_password MLFLOW_DB_PASSWORD

-- A statement that fails is written to the server's log, with the password in it.
SET log_min_error_statement = panic;

SELECT format('CREATE ROLE %I', name)
FROM unnest(ARRAY['rankwise', 'mlflow']) AS name
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name)
\gexec
ALTER ROLE rankwise LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION CONNECTION LIMIT 150 PASSWORD :'queue_password';
ALTER ROLE mlflow LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION CONNECTION LIMIT 120 PASSWORD :'mlflow_password';

-- MLflow keeps its users and their rights apart from its runs.
SELECT format('CREATE DATABASE %I OWNER %I', name, owner)
FROM (VALUES ('rankwise', 'rankwise'), ('mlflow', 'mlflow'), ('mlflow_auth', 'mlflow')) AS wanted(name, owner)
WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = name)
\gexec

-- By default everybody who can log in may enter every database.
REVOKE ALL ON DATABASE rankwise, mlflow, mlflow_auth, postgres, template1 FROM PUBLIC;
