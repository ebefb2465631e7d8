#!/bin/sh
# backup.sh FOLDER KEEP: a dump of the Postgres database at $MLFLOW_BACKEND_STORE_URI, read once to its end; the oldest dumps go.
set -eu
mkdir -p "$1"
target=$1/mlflow-$(date -u +%Y%m%dT%H%M%SZ).dump
database=$(printf %s "$MLFLOW_BACKEND_STORE_URI" | sed 's/^postgresql+[a-z0-9]*:/postgresql:/') # SQLAlchemy names its driver
pg_dump --format=custom --file "$target.partial" "$database"
pg_restore --file /dev/null "$target.partial"
mv "$target.partial" "$target"
ls "$1"/mlflow-*.dump | head -n "-$2" | xargs -r rm --
ls -l "$target"
