"""The child process that holds a process's place in a group: see ``hosts.py``, which starts it and says why.

It speaks in lines of JSON. It is told ``{"state": {...}}`` (what the others shall know), ``{"claim": name}`` and
``{"leave": true}``; it tells ``{"joined": [index, count]}``, ``{"states": [...]}`` whenever one has changed, and
``{"claimed": number}``. Where its input ends without a farewell, the process that it serves is gone.

It imports nothing of this library, so that it starts wherever that was imported from.
"""

import json
import os
import signal
import sys
import threading
import time

_POLL_SECONDS = 0.25
_STATES = "mer_jax/states/"
_CLAIMS = "mer_jax/claims/"


def main(options: dict) -> None:
    """Joins, and serves until its input ends.

    Args:
        options: Arguments of ``jax.distributed.initialize``.
    """
    for signum in (signal.SIGINT, signal.SIGTERM):  # these reach whole jobs; the process that is served decides
        signal.signal(signum, signal.SIG_IGN)
    import jax

    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM over again
    jax.distributed.initialize(**options)
    # JAX has no public way to its key-value store; orbax goes this way, too.
    from jax._src.distributed import global_state

    client, index, count = global_state.client, global_state.process_id, global_state.num_processes
    writing = threading.Lock()

    def say(**line):
        with writing:
            print(json.dumps(line), flush=True)

    say(joined=[index, count])
    last: dict = {}

    def listen():
        leaving = False
        for line in sys.stdin:
            told = json.loads(line)
            if "claim" in told:
                say(claimed=client.key_value_increment(_CLAIMS + told["claim"], 1) - 1)
            elif "state" in told:
                last.update(told["state"])
                client.key_value_set(f"{_STATES}{index}", json.dumps(last), allow_overwrite=True)
            else:
                leaving = True
        if leaving:
            jax.distributed.shutdown()
            os._exit(0)
        last.setdefault("failure", "was lost")
        client.key_value_set(f"{_STATES}{index}", json.dumps(last), allow_overwrite=True)
        time.sleep(8 * _POLL_SECONDS)  # where the others meet here, they have seen it by then
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    seen: list[dict] = []
    while True:
        states: list[dict] = [{} for _ in range(count)]
        for key, value in client.key_value_dir_get(_STATES):
            states[int(key.rsplit("/", 1)[1])] = json.loads(value)
        if states != seen:
            say(states=states)
            seen = states
        time.sleep(_POLL_SECONDS)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
