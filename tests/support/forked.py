"""`python -P -m tests.support.forked FILE`: writes to the file what it finds about itself, and sleeps."""

import json
import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    print("written by the child", flush=True)
    file = Path(sys.argv[1])
    report = {
        "file": sys.argv[1],
        "pid": os.getpid(),
        "parent": os.getppid(),
        "session": os.getsid(0),
        "secret": os.environ.get("SECRET"),
        "imported": "workers.celery.app" in sys.modules,
        "threads": len(list(Path("/proc/self/task").iterdir())),
    }
    new = file.with_suffix(".new")
    new.write_text(json.dumps(report))
    new.replace(file)
    time.sleep(600)
