#!/bin/sh
# platform/deploy/backup.sh DIRECTORY: a copy of a running team, to be read by restore.sh.
#
# The order makes the copy whole: what the queue calls done is in MLflow by then, and what MLflow names is in the
# bucket. What is written meanwhile may be in the later parts only, and is not missed.
set -eu
target="${1:?usage: backup.sh DIRECTORY}"
compose="${COMPOSE:-docker compose}"
umask 077
mkdir -p "$target"
if [ -n "$(ls -A "$target")" ]; then
    echo "$target is not empty: name a new directory" >&2
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
echo "saved to $target; keep .env with it, elsewhere" >&2
