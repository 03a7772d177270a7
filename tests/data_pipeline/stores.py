"""Stores that tests build into: the real protocols of S3 and GCS, spoken by servers of this machine."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

POLICY = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}

S3 = """
import logging, sys
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer("127.0.0.1", int(sys.argv[1]), verbose=False)
server.start()
sys.stdin.read()
"""
GCS = """
import logging, sys
from gcp_storage_emulator.server import create_server
server = create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="bucket")
logging.disable(logging.CRITICAL)
server.start()
sys.stdin.read()
"""


@dataclass
class Server:
    """A server, and the environment in which clients find it."""

    process: subprocess.Popen[str]
    url: str
    env: dict[str, str]


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def served(code: str, port: int) -> Iterator[Server]:
    """A server in a process of its own, which ends with the block."""
    process = subprocess.Popen([sys.executable, "-c", code, str(port)], text=True, stdin=subprocess.PIPE,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert process.poll() is None, "the server did not start"
            time.sleep(0.1)
        yield Server(process, f"http://127.0.0.1:{port}", {})
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def s3() -> Iterator[Server]:
    """An S3 with the bucket `bucket`, which knows one user, and refuses all others."""
    with served(S3, free_port()) as server:
        place = {"AWS_ENDPOINT_URL": server.url, "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
        server.env = place | {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "yet"}
        made = subprocess.run(
            [sys.executable, "-c", USER], env=os.environ | server.env, capture_output=True, timeout=60
        )
        key = json.loads(made.stdout)
        server.env |= {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}
        guard = urllib.request.Request(f"{server.url}/moto-api/reset-auth", b"0", {"Content-Type": "text/plain"})
        urllib.request.urlopen(guard, timeout=10).close()
        yield server


USER = f"""
import boto3, json
boto3.client("s3").create_bucket(Bucket="bucket")
iam = boto3.client("iam")
iam.create_user(UserName="user")
iam.put_user_policy(UserName="user", PolicyName="all", PolicyDocument='{json.dumps(POLICY)}')
print(json.dumps(iam.create_access_key(UserName="user")["AccessKey"], default=str))
"""


@contextlib.contextmanager
def gcs() -> Iterator[Server]:
    """A GCS with the bucket `bucket`. Unlike the real one it asks nobody who he is, and ignores conditions."""
    with served(GCS, free_port()) as server:
        server.env = {
            "STORAGE_EMULATOR_HOST": server.url,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "NO_GCE_CHECK": "true",
        }
        yield server
