#!/bin/sh
# Writes the object store's identities from the environment to memory, and starts it.
#
# `mlflow` has access to MLflow's bucket only; `admin` creates and copies the bucket.
set -eu
: "${OBJECT_STORE_SECRET_KEY:?}" "${OBJECT_STORE_ADMIN_KEY:?}"
config="${TMPDIR:-/tmp}/object-store.json"
umask 077
cat > "$config" <<CONFIG
{"identities": [
  {"name": "mlflow", "credentials": [{"accessKey": "mlflow", "secretKey": "$OBJECT_STORE_SECRET_KEY"}],
   "actions": ["Read:mlflow", "Write:mlflow", "List:mlflow", "Tagging:mlflow"]},
  {"name": "admin", "credentials": [{"accessKey": "admin", "secretKey": "$OBJECT_STORE_ADMIN_KEY"}],
   "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
]}
CONFIG
unset OBJECT_STORE_SECRET_KEY OBJECT_STORE_ADMIN_KEY
exec weed -logtostderr=true "$@" "-s3.config=$config"
