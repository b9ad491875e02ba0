"""PostgreSQL on the machines: Patroni with etcd, on their usual ports. One of the two replicas is synchronous."""

import json
import shutil
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tests.support.machines import MACHINES, RECIPE, Machines, ip

DEBIAN_POSTGRES = Path("/usr/lib/postgresql")
PACKAGES = {"patroni": "patroni python3-etcd", "etcd": "etcd-server"}  # by command
SUPERUSER = {"username": "postgres", "password": "x"}
# The power cut of this test is a SIGKILL, which leaves the kernel's page cache intact. So fsync adds nothing but load.
LIGHT = {"fsync": "off", "shared_buffers": "64MB", "max_wal_size": "256MB"}


def missing_packages() -> str:
    """The Debian packages of the services that are not installed, for apt-get install."""
    found = [packages for command, packages in PACKAGES.items() if shutil.which(command) is None]
    if _postgres_binaries() is None:
        found.append("postgresql")
    return " ".join(found)


def start_postgres(machines: Machines, machine: int) -> None:
    """Starts a member of PostgreSQL's cluster with the data on its disk."""
    _start_etcd(machines, machine)
    _start_patroni(machines, machine)


def _postgres_binaries() -> Path | None:
    """Debian's newest PostgreSQL. The wheel's has neither pg_rewind nor pg_basebackup."""
    found = sorted(DEBIAN_POSTGRES.glob("*/bin/pg_rewind"), key=lambda file: int(file.parts[-3]))
    return found[-1].parent if found else None


def _start_etcd(machines: Machines, machine: int) -> None:
    """Starts a member of etcd's cluster, which elects PostgreSQL's primary."""
    folder = machines.disk(machine) / "etcd"
    address, peers = f"http://{ip(machine)}", ",".join(f"m{one}=http://{ip(one)}:2380" for one in MACHINES)
    options = {
        "--name": f"m{machine}",
        "--data-dir": str(folder),
        "--initial-cluster": peers,
        "--initial-cluster-state": "existing" if folder.exists() else "new",
        "--initial-cluster-token": "headrace",
        "--initial-advertise-peer-urls": f"{address}:2380",
        "--listen-peer-urls": f"{address}:2380",
        "--listen-client-urls": f"{address}:2379,http://127.0.0.1:2379",
        "--advertise-client-urls": f"{address}:2379",
    }
    words = (word for option in options.items() for word in option)
    machines.start(machine, "etcd", "etcd", "--enable-v2", "--unsafe-no-fsync", *words, environment={})


def _start_patroni(machines: Machines, machine: int) -> None:
    """Starts Patroni, which starts PostgreSQL: as the primary, or as a replica that it creates or rewinds."""
    folder, file = machines.disk(machine) / "postgres", _patroni_file(machines, machine)
    folder.mkdir(exist_ok=True)
    shutil.chown(folder, "postgres", "postgres")
    folder.chmod(0o700)
    file.write_text(json.dumps(_patroni_settings(machine, folder)))
    machines.start(machine, "patroni", "patroni", str(file), environment={}, user="postgres")


def patronictl(machines: Machines, machine: int, *arguments: str) -> str:
    """The output of patronictl on a machine."""
    return machines.run(machine, "patronictl", "-c", str(_patroni_file(machines, machine)), *arguments)


def _patroni_file(machines: Machines, machine: int) -> Path:
    return machines.disk(machine) / "patroni.yml"  # JSON, which YAML includes


def _patroni_settings(machine: int, folder: Path) -> dict[str, Any]:
    """The recipe's settings of the cluster, with the addresses of the machines and without passwords."""
    network = f"{ip(machine).rpartition('.')[0]}.0/24"
    binaries = _postgres_binaries()
    assert binaries is not None, "PostgreSQL is not installed (Debian: apt-get install postgresql)"
    shared = YAML(typ="safe").load(RECIPE / "patroni.yml")["bootstrap"]["dcs"]
    shared["postgresql"]["parameters"] |= LIGHT
    return {
        "scope": "headrace",
        "name": f"m{machine}",
        "restapi": {"listen": f"{ip(machine)}:8008", "connect_address": f"{ip(machine)}:8008"},
        # With etcd's API 3, Debian's Patroni 3.0.2 writes the leader's key without comparing it. A primary that had
        # been frozen for 40 s took the key from its successor, with which the successor's commits would be lost. With
        # API 2 it compares. The recipe's Patroni 4 compares with both.
        "etcd": {"hosts": [f"{ip(one)}:2379" for one in MACHINES]},
        "bootstrap": {
            "dcs": shared,
            "initdb": [{"encoding": "UTF8"}, {"locale": "C.UTF-8"}, {"auth": "trust"}, "no-sync"],
            "pg_hba": [
                "local all all trust",
                "host all all 127.0.0.1/32 trust",
                f"host all all {network} trust",
                f"host replication all {network} trust",
            ],
        },
        "postgresql": {
            "listen": f"{ip(machine)},127.0.0.1:5432",
            "connect_address": f"{ip(machine)}:5432",
            "data_dir": str(folder),
            "bin_dir": str(binaries),
            "authentication": {"superuser": SUPERUSER, "replication": SUPERUSER, "rewind": SUPERUSER},
            "parameters": {"unix_socket_directories": "/run"},
            "pgpass": str(folder.parent / "tmp" / "pgpass"),
        },
        "watchdog": {"mode": "off"},  # the test machine has none
    }
