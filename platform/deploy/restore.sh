#!/bin/sh
# platform/deploy/restore.sh DIRECTORY: restores a backup of backup.sh into a new, empty team.
#
#   docker compose up --detach --wait postgres object-store            with the .env of the backup, on fresh volumes
#   docker compose run --rm bucket
#   platform/deploy/restore.sh DIRECTORY
#   docker compose up --detach --wait
set -eu
source="${1:?usage: restore.sh DIRECTORY}"
compose="${COMPOSE:-docker compose}"
(cd "$source" && sha256sum --quiet --check SHA256SUMS)
for database in rankwise mlflow mlflow_auth; do
    tables="SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"
    if [ "$($compose exec -T postgres psql --username=postgres -Atqc "$tables" "$database" < /dev/null)" != 0 ]; then
        echo "the database $database has tables: restore into empty databases only (on fresh volumes)" >&2
        exit 2
    fi
done
for database in rankwise mlflow mlflow_auth; do
    $compose exec -T postgres pg_restore --username=postgres --dbname="$database" --exit-on-error \
        --single-transaction < "$source/$database.dump"
done
$compose --profile tools run --rm -T bucket-copy python /deploy/bucket.py load < "$source/bucket.tar"
echo "restored from $source" >&2
