"""A run on a Ray cluster: one rank for each GPU, wherever Ray finds them.

    ray job submit --working-dir . -- python launch/ray_ranks.py --ranks 16 run.toml --output_dir /shared/run

output_dir must be on a disk that all machines share. Each rank is a process of its own inside a Ray actor, not one of Ray Train.
So the ranks watch each other (minisft/peers.py), save when Ray stops the job, and end with minisft's exit codes. After 69 (a rank
is gone, or its machine) the ranks start again from the last checkpoint, --restarts times.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

PEER, STOPPED = 69, 75  # exit codes: minisft/errors.py
stop_asked = threading.Event()


@ray.remote(max_concurrency=2)  # `stop` is called while `run` waits
class Rank:
    """One process. Ray shows it one GPU, so it is always the local rank 0."""

    process: subprocess.Popen | None = None

    def address(self) -> tuple[str, int]:
        """Where the ranks meet, if this is the first one."""
        with socket.socket() as free:
            free.bind(("", 0))
            return ray.util.get_node_ip_address(), free.getsockname()[1]

    def run(self, arguments: list[str], environment: dict[str, str]) -> int:
        command = [sys.executable, "-m", "minisft.train", *arguments]
        self.process = subprocess.Popen(command, env=os.environ | environment)  # Ray keeps its output, by rank
        code = self.process.wait()
        return 128 - code if code < 0 else code

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()


def train(arguments: list[str], count: int, resources: dict[str, float]) -> int:
    """The exit code of the rank that says most: of one that failed, not of those that ended because of it."""
    group = placement_group([resources] * count, strategy="PACK")  # as few machines as possible
    try:
        ray.get(group.ready())
        place = {"num_cpus": resources["CPU"], "num_gpus": resources.get("GPU", 0)}
        ranks = [
            Rank.options(**place, scheduling_strategy=PlacementGroupSchedulingStrategy(group, i)).remote()
            for i in range(count)
        ]
        host, port = ray.get(ranks[0].address.remote())
        meet = {"MASTER_ADDR": host, "MASTER_PORT": str(port), "WORLD_SIZE": str(count), "LOCAL_RANK": "0"}
        waiting = [rank.run.remote(arguments, meet | {"RANK": str(i)}) for i, rank in enumerate(ranks)]
        codes, is_told = [], False
        while waiting:
            ready, waiting = ray.wait(waiting, timeout=1)
            codes += map(code_of, ready)
            if stop_asked.is_set() and not is_told:
                is_told = True
                for rank in ranks:
                    rank.stop.remote()
        return next((code for code in codes if code not in (0, PEER)), max(codes))
    finally:
        remove_placement_group(group)


def code_of(result) -> int:
    try:
        return ray.get(result)
    except ray.exceptions.RayError as error:  # the actor, or its machine, is gone
        print(f"ray_ranks: {error}", file=sys.stderr)
        return PEER


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--cpus", type=float, default=8, help="of a rank")
    parser.add_argument("--gpus", type=float, default=1, help="of a rank; 0 = on CPUs")
    parser.add_argument("--restarts", type=int, default=3, help="after a rank was lost")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of minisft.train")
    options = parser.parse_args()
    ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=True)
    signal.signal(
        signal.SIGTERM, lambda *_: stop_asked.set()
    )  # `ray job stop`; after ray.init, which has a handler of its own
    resources = {"CPU": options.cpus} | ({"GPU": options.gpus} if options.gpus else {})
    for left in range(options.restarts, -1, -1):
        code = train(options.arguments, options.ranks, resources)
        lost = code == PEER or code > 128
        if not lost or stop_asked.is_set() or not left:
            break
        print(f"ray_ranks: a rank is gone (exit code {code}); starting again from the last checkpoint", file=sys.stderr)
    return STOPPED if lost and stop_asked.is_set() else code


if __name__ == "__main__":
    sys.exit(main())
