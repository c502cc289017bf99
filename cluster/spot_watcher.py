"""Turn the cloud's spot interruption notice into `ray drain-node`, so Ray leaves the VM before it is gone.

Runs beside the raylet of each worker VM: open-source Ray does not poll the notice. Standard library only.
"""

import argparse
import json
import logging
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

logger = logging.getLogger("spot_watcher")

AWS = "http://169.254.169.254/latest"
GCP = "http://metadata.google.internal/computeMetadata/v1"
AWS_SECONDS = 110  # 120 promised, less one poll and the start of the ray command
GCP_SECONDS = 25  # 30 promised

Fetch = Callable[[str, str, Mapping[str, str]], tuple[int, str]]
"""(method, url, headers) -> (HTTP status, body); raises OSError when nothing answers."""


class MetadataError(RuntimeError):
    """The metadata service gave no usable answer; the next poll asks again."""


class RayletError(RuntimeError):
    """This VM has no raylet to drain (yet)."""


@dataclass(frozen=True, slots=True)
class Notice:
    """The VM will be taken away."""

    reason: str
    seconds_left: int


@dataclass(frozen=True, slots=True)
class Raylet:
    """The local Ray node, as named on the raylet's command line."""

    node_id: str
    gcs_address: str


def http_fetch(method: str, url: str, headers: Mapping[str, str]) -> tuple[int, str]:
    """Ask a link-local service: never through a proxy, and an HTTP error status is an answer."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, method=method, headers=dict(headers))
    try:
        with opener.open(request, timeout=2) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""


def _ask(fetch: Fetch, method: str, url: str, headers: Mapping[str, str], none_at: int | None = None) -> str | None:
    try:
        status, body = fetch(method, url, headers)
    except OSError as error:
        raise MetadataError(f"{method} {url}: {error}") from error
    if status == none_at:
        return None
    if status != 200:
        raise MetadataError(f"{method} {url}: HTTP {status}")
    return body.strip()


def aws_notice(fetch: Fetch, now: datetime) -> Notice | None:
    """Read the interruption notice through IMDSv2; 404 means there is none."""
    token = _ask(fetch, "PUT", f"{AWS}/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"})
    headers = {"X-aws-ec2-metadata-token": token or ""}
    body = _ask(fetch, "GET", f"{AWS}/meta-data/spot/instance-action", headers, none_at=404)
    if body is None:
        return None
    try:
        action = json.loads(body)
        at = datetime.fromisoformat(action["time"])
        return Notice(f"AWS spot {action['action']} at {action['time']}", max(0, int((at - now).total_seconds())))
    except (ValueError, KeyError, TypeError) as error:
        # A 200 is a notice whatever its text: draining on a guessed deadline beats losing the step.
        logger.warning("unreadable AWS notice %r (%s): draining with %d s left", body, error, AWS_SECONDS)
        return Notice("AWS spot interruption, unreadable notice", AWS_SECONDS)


def gcp_notice(fetch: Fetch, now: datetime) -> Notice | None:
    """Read the preemption flag; Google gives no time with it."""
    body = _ask(fetch, "GET", f"{GCP}/instance/preempted", {"Metadata-Flavor": "Google"})
    if body not in ("TRUE", "FALSE"):
        raise MetadataError(f"instance/preempted is {body!r}, expected TRUE or FALSE")
    return Notice("GCP preemption", GCP_SECONDS) if body == "TRUE" else None


NOTICES: dict[str, Callable[[Fetch, datetime], Notice | None]] = {"aws": aws_notice, "gcp": gcp_notice}


def local_raylet(proc: Path = Path("/proc")) -> Raylet:
    """Find the raylet of this VM. `ray drain-node` without --node-id may start, and drain, a new cluster."""
    for cmdline in proc.glob("[0-9]*/cmdline"):
        try:
            program, *arguments = cmdline.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # the process ended between the listing and the read
            continue
        if Path(program).name != "raylet":
            continue
        flags = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
        if "--node_id" in flags and "--gcs-address" in flags:
            return Raylet(flags["--node_id"], flags["--gcs-address"])
    raise RayletError("no raylet with --node_id and --gcs-address is running on this VM")


def drain_command(ray: str, raylet: Raylet, notice: Notice) -> list[str]:
    """Build the (hidden, unstable) Ray command; tests parse it with the pinned Ray's own parser."""
    return [
        ray,
        "drain-node",
        f"--address={raylet.gcs_address}",
        f"--node-id={raylet.node_id}",
        "--reason=DRAIN_NODE_REASON_PREEMPTION",
        f"--reason-message={notice.reason}",
        f"--deadline-remaining-seconds={notice.seconds_left}",
    ]


def drain(ray: str, notice: Notice) -> None:
    """Drain this node; raises RayletError or OSError or subprocess.SubprocessError."""
    command = drain_command(ray, local_raylet(), notice)
    subprocess.run(command, check=True, timeout=max(10, notice.seconds_left))


def watch(
    poll: Callable[[], Notice | None],
    drain: Callable[[Notice], None],
    sleep: Callable[[float], None],
    poll_seconds: float,
) -> Notice:
    """Poll until a notice has been turned into a drain; each outage is logged once, not once a poll."""
    outage = ""
    while True:
        try:
            notice = poll()
            if outage:
                logger.info("the metadata service answers again")
            outage = ""
        except MetadataError as error:
            if str(error) != outage:
                logger.warning("cannot read the notice, will keep asking: %s", error)
            outage, notice = str(error), None
        if notice is not None:
            logger.warning("%s: draining with %d s left", notice.reason, notice.seconds_left)
            try:
                drain(notice)
                return notice
            except (RayletError, OSError, subprocess.SubprocessError) as error:
                logger.error("drain failed, will try again: %s", error)
        sleep(poll_seconds)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cloud", choices=sorted(NOTICES), required=True)
    parser.add_argument("--poll-seconds", type=float, default=2.0)
    parser.add_argument("--ray", default=str(Path(sys.executable).with_name("ray")), help="the ray command")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    read = NOTICES[options.cloud]
    logger.info("watching the %s spot notice every %.1f s", options.cloud, options.poll_seconds)
    watch(
        lambda: read(http_fetch, datetime.now(UTC)),
        lambda notice: drain(options.ray, notice),
        time.sleep,
        options.poll_seconds,
    )


if __name__ == "__main__":
    main()
