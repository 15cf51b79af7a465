"""Google Cloud's notice, a minute or more ahead, that it will take this machine away: a request to stop like SIGTERM.

The metadata server answers a waiting request when a value changes:
https://cloud.google.com/compute/docs/metadata/getting-live-migration-notice, …/instances/preemptible (preempted).
"""

import http.client
import os
import threading
import urllib.error
import urllib.request
from pathlib import Path

from gpt2_xla.runtime.stop_signals import StopRequest

# A live migration (MIGRATE_ON_HOST_MAINTENANCE) is no reason to stop.
NOTICES = {"maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE", "preempted": "TRUE"}
FIRST_TRIES = 3  # a busy host may miss the answer to one
WAIT_SECONDS = 300  # after which the server answers though nothing changed
_PRODUCT = Path("/sys/class/dmi/id/product_name")


def watch_maintenance(stop: StopRequest) -> None:
    """From now on a notice asks `stop`; returns at once. Elsewhere than on Google Cloud, and in all but one process of a
    host, it does nothing; where the metadata server doesn't answer, nothing either, and nobody is told.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0" or not on_google_cloud():
        return
    for key, notice in NOTICES.items():
        threading.Thread(target=_watch, args=(key, notice, stop), daemon=True, name=f"notice {key}").start()


def on_google_cloud() -> bool:
    """Whether there may be a metadata server: told by the firmware, or by GCE_METADATA_HOST."""
    if os.environ.get("GCE_METADATA_HOST"):
        return True
    try:
        return "Google" in _PRODUCT.read_text()
    except OSError:
        return False


def _watch(key: str, notice: str, stop: StopRequest) -> None:
    """Wait for a value to become `notice`."""
    pause = threading.Event()
    answered, tag, tries = False, "", FIRST_TRIES
    while not stop.requested:
        try:
            # One of the first questions must be answered at once, or there is no such server.
            value, tag = _ask(key, tag) if answered else _ask(key, "", wait=False)
        except (OSError, http.client.HTTPException):
            tries -= 1
            if not answered and not tries:
                return
            tag = ""
            pause.wait(10.0)
            continue
        if value.upper() == notice and not stop.requested:
            os.write(2, f"\nthe metadata server says {key} = {value}: stopping after this step\n".encode())
            stop.request_stop()
        answered = True
        pause.wait(1.0)  # a server that answers at once, whatever it is asked, shall not be asked all the time


def _ask(key: str, tag: str, wait: bool = True) -> tuple[str, str]:
    """A value and its tag; with `wait` only when it differs from the one that `tag` is of."""
    host = os.environ.get("GCE_METADATA_HOST") or "metadata.google.internal"
    query = f"?wait_for_change=true&timeout_sec={WAIT_SECONDS}&last_etag={tag or 0}" if wait else ""
    request = urllib.request.Request(
        f"http://{host}/computeMetadata/v1/instance/{key}{query}", headers={"Metadata-Flavor": "Google"}
    )
    straight = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy has no metadata of this machine
    with straight.open(request, timeout=WAIT_SECONDS + 30 if wait else 3) as answer:
        return answer.read().decode().strip(), answer.headers.get("ETag", "")
