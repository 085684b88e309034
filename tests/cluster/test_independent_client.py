"""A foreign client: generated from `proto/` alone, in a process that can't import `baton`."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.cluster.conftest import Running

pytestmark = pytest.mark.asyncio(loop_scope="package")

PROTO = Path(__file__).parents[2] / "proto"
CLIENT = """
import json, sys
sys.path.insert(0, sys.argv[2])
class Blocked:
    def find_spec(self, name, path=None, target=None):
        assert not name.startswith(("router", "kvtransfer")), name
sys.meta_path.insert(0, Blocked())
import grpc
from baton.v1 import generation_pb2 as pb, generation_pb2_grpc as rpc
import baton
assert not hasattr(baton, "__file__") or baton.__file__ is None, "the generated package only"
stub = rpc.GenerationStub(grpc.insecure_channel(sys.argv[1]))
request = pb.GenerateRequest(
    chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="What is the capital of France?")]),
    sampling=pb.Sampling(temperature=0.0),
)
kinds, text = [], ""
for event in stub.Generate(request, timeout=60):
    kinds.append(event.WhichOneof("event"))
    text += event.tokens.text
try:
    list(stub.Generate(pb.GenerateRequest(prompt="x", sampling=pb.Sampling(top_p=2.0)), timeout=60))
except grpc.RpcError as error:
    refusal = [error.code().name, error.details()]
print(json.dumps({"kinds": kinds, "text": text, "refusal": refusal}))
"""


def run(command: list[str], folder: Path) -> str:
    """Its output; an assertion with its errors when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


async def test_a_client_generated_from_proto_streams_a_completion(plain: Running, tmp_path: Path) -> None:
    sources = sorted(str(path.relative_to(PROTO)) for path in PROTO.rglob("*.proto"))
    generate = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO}", f"--python_out={tmp_path}"]
    await asyncio.to_thread(run, [*generate, f"--grpc_python_out={tmp_path}", *sources], tmp_path)
    # -S and -P: nothing of this project is importable; only the libraries that such a client needs are let in.
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    only_libraries = "import sys; sys.path[:0] = " + repr(libraries)
    command = [sys.executable, "-S", "-P", "-c", f"{only_libraries}\n{CLIENT}", plain.cluster.address, str(tmp_path)]
    result = json.loads(await asyncio.to_thread(run, command, tmp_path))
    assert result["text"] == "The capital of France is Paris."
    assert result["kinds"][0] == "accepted"
    assert result["kinds"][-1] == "finished"
    assert set(result["kinds"][1:-1]) == {"tokens"}
    assert result["refusal"][0] == "INVALID_ARGUMENT"
    assert "sampling.top_p" in result["refusal"][1]


async def test_the_router_is_small_and_has_no_torch(plain: Running) -> None:
    await plain.client.complete(prompt="Hello", max_tokens=2)
    router = next(child for child in plain.cluster.processes if child.role == "router")
    process = psutil.Process(router.pid)
    assert process.memory_info().rss <= 200 * 2**20
    mapped = {Path(entry.path).name for entry in process.memory_maps()}
    assert not [name for name in mapped if "torch" in name]


async def test_every_process_has_health_and_reflection(plain: Running) -> None:
    import grpc
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

    from baton.client import Client

    for child in plain.cluster.processes:
        async with Client(child.address) as client:
            for name in ("", "liveness", "readiness"):
                assert await client.health(name) == "serving", (child.name, name)

        def services(address: str = child.address) -> list[str]:
            with grpc.insecure_channel(address) as channel:
                return list(ProtoReflectionDescriptorDatabase(channel).get_services())

        expected = {"baton.v1.Admin", "grpc.health.v1.Health"}
        expected |= {"baton.v1.Generation", "baton.v1.Registry"} if child.role == "router" else {"baton.v1.Worker"}
        expected |= {"baton.v1.Transfer"} if child.role == "decode" else set()
        assert expected <= set(await asyncio.to_thread(services))
