-- Creates the team's databases and users, for the queue and for MLflow. PostgreSQL's image runs this on an empty volume.
-- To change a password, change it in the environment and run this again:
--   docker compose up --detach postgres
--   docker compose exec postgres psql -v ON_ERROR_STOP=1 -f /docker-entrypoint-initdb.d/postgres.sql
\getenv queue_password RANKWISE_DB_PASSWORD
\getenv mlflow_password MLFLOW_DB_PASSWORD

-- Otherwise the server's log would show failed statements, with the password.
SET log_min_error_statement = panic;

SELECT format('CREATE ROLE %I', name)
FROM unnest(ARRAY['rankwise', 'mlflow']) AS name
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name)
\gexec
ALTER ROLE rankwise LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION CONNECTION LIMIT 150 PASSWORD :'queue_password';
ALTER ROLE mlflow LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION CONNECTION LIMIT 120 PASSWORD :'mlflow_password';

-- MLflow stores users and permissions separately from runs.
SELECT format('CREATE DATABASE %I OWNER %I', name, owner)
FROM (VALUES ('rankwise', 'rankwise'), ('mlflow', 'mlflow'), ('mlflow_auth', 'mlflow')) AS wanted(name, owner)
WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = name)
\gexec

-- By default, every user can connect to every database.
REVOKE ALL ON DATABASE rankwise, mlflow, mlflow_auth, postgres, template1 FROM PUBLIC;
