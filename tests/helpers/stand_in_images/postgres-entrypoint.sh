#!/bin/bash
# What PostgreSQL's image promises of its start: an empty volume is initialised with POSTGRES_PASSWORD and
# POSTGRES_INITDB_ARGS, the files of /docker-entrypoint-initdb.d run while the server listens on its socket only, and
# then the server starts. Connections from elsewhere need a password.
set -euo pipefail
if [ "$1" = postgres ] && [ ! -s "$PGDATA/PG_VERSION" ]; then
    install --directory --mode 0700 "$PGDATA"
    # shellcheck disable=SC2086  # several options in one variable
    initdb --username=postgres --auth-local=trust --pwfile=<(printf '%s\n' "$POSTGRES_PASSWORD") ${POSTGRES_INITDB_ARGS:-}
    printf 'host all all all scram-sha-256\n' >> "$PGDATA/pg_hba.conf"
    pg_ctl -D "$PGDATA" -o "-c listen_addresses=''" -w start
    for script in /docker-entrypoint-initdb.d/*.sql; do
        psql -v ON_ERROR_STOP=1 --no-psqlrc --username=postgres --dbname=postgres --file="$script"
    done
    pg_ctl -D "$PGDATA" -m fast -w stop
fi
exec "$@"
