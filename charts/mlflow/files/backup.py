"""backup.py DATABASE FOLDER KEEP: a consistent copy of an SQLite database in use, verified; the oldest copies go."""

import sqlite3
import sys
import time
from pathlib import Path

database, folder, keep = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
folder.mkdir(parents=True, exist_ok=True)
target = folder / time.strftime("mlflow-%Y%m%dT%H%M%SZ.db", time.gmtime())
partial = target.with_suffix(".partial")
with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as source, sqlite3.connect(partial) as copy:
    source.backup(copy)
    if copy.execute("PRAGMA integrity_check").fetchone() != ("ok",):
        sys.exit(f"the copy of {database} is damaged; {partial} is kept for a look")
partial.rename(target)
for old in sorted(folder.glob("mlflow-*.db"))[:-keep]:
    old.unlink()
print(f"{target}: {target.stat().st_size} bytes")
