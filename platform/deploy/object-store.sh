#!/bin/sh
# Writes who may do what in the object store out of the environment, to memory, and starts it.
#
# `mlflow` reads and writes in MLflow's bucket and nowhere else; `admin` makes the bucket and copies it.
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
