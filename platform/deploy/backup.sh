#!/bin/sh
# platform/deploy/backup.sh DIRECTORY: backs up a running team, for restore.sh.
#
# The order makes the backup consistent: jobs that are done in the queue are already in MLflow, and files that MLflow
# refers to are already in the bucket. Data that is written meanwhile may be in the later parts only.
set -eu
target="${1:?usage: backup.sh DIRECTORY}"
compose="${COMPOSE:-docker compose}"
umask 077
mkdir -p "$target"
if [ -n "$(ls -A "$target")" ]; then
    echo "$target is not empty: choose a new directory" >&2
    exit 2
fi
for database in rankwise mlflow mlflow_auth; do
    $compose exec -T postgres pg_dump --username=postgres --format=custom "$database" > "$target/.part"
    mv "$target/.part" "$target/$database.dump"
done
$compose --profile tools run --rm -T bucket-copy python /deploy/bucket.py save > "$target/.part"
mv "$target/.part" "$target/bucket.tar"
(cd "$target" && sha256sum rankwise.dump mlflow.dump mlflow_auth.dump bucket.tar > SHA256SUMS)
sync "$target"
echo "saved to $target; back up .env too, in another place" >&2
