"""`hlfs check`: verifies a store that is not mounted, and names what is damaged."""

from dataclasses import asdict
from typing import Any

import click
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from hlfsfs.cli.output import format_size, print_json, progress_bar
from hlfsfs.errors import HlfsError, NoSuchName, printable
from hlfsfs.store import Store, locate, open_store

FOUND_DAMAGE = 1


@click.command("check", short_help="Verify every checksum and map pointer of a store that is not mounted.")
@click.argument("uri")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(uri: str, as_json: bool) -> int:
    """Verify what URI names: a store, a pool or a volume. Changes nothing.

    Exit status 0: sound; 1: damaged, or it could not be checked.
    """
    root, path = locate(uri)
    store = open_store(root, read_only=True)
    try:
        report = _check(store, path, printable(uri))
    except NoSuchName as exc:
        volume, separator, _ = printable(uri).rpartition("%")
        if not separator:
            raise
        raise HlfsError(f"{exc}; a snapshot is verified with its volume: name {volume}") from exc
    finally:
        store.close()
    if as_json:
        print_json(report)
    else:
        _print(report)
    return 0 if report["sound"] else FOUND_DAMAGE


def _check(store: Store, path: bytes, uri: str) -> dict[str, Any]:
    from hlfsfs.engine.check import check_volume, last_use, log_bytes  # noqa: PLC0415 - loads the native core
    from hlfsfs.pool.check import check_names  # noqa: PLC0415

    ended = last_use(store, store.lock())
    names = check_names(store, path)
    volumes = []
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with progress_bar(*columns) as bar:
        total = sum(log_bytes(store, volume.record) for volume in names.volumes)
        task = bar.add_task("checking", total=total)
        for volume in sorted(names.volumes, key=lambda found: found.name):
            bar.update(task, description=volume.name)
            result = check_volume(store, volume.record, _advance(bar, task))
            damage = [{**asdict(one), "text": str(one)} for one in result.damage]
            ids = {"name": volume.name, "id": f"{volume.record.id:016x}", "uuid": str(volume.record.uuid)}
            volumes.append({**ids, **asdict(result), "damage": damage})
    sound = not names.damage and not any(volume["damage"] for volume in volumes)
    errors = [str(exc) for exc in names.damage]
    return {"uri": uri, "sound": sound, "last_use": asdict(ended), "damage": errors, "volumes": volumes}


def _advance(bar: Progress, task: TaskID) -> Any:
    return lambda size_bytes: bar.advance(task, size_bytes)


def _print(report: dict[str, Any]) -> None:
    ended = report["last_use"]
    if not ended["clean"]:
        print(f"The last use of the store ended uncleanly; the next mount {ended['next_mount']}.")
    for line in report["damage"]:
        print(line)
    for volume in report["volumes"]:
        for damage in volume["damage"]:
            print(f"{volume['name']}: {damage['text']}")
    counts = {
        key: sum(volume[key] for volume in report["volumes"]) for key in ("read_bytes", "payload_blocks", "pointers")
    }
    found = len(report["damage"]) + sum(len(volume["damage"]) for volume in report["volumes"])
    verdict = "no damage" if report["sound"] else f"{found} damaged places"
    print(
        f"{len(report['volumes'])} volumes, {format_size(counts['read_bytes'])} read, "
        f"{counts['payload_blocks']} blocks and {counts['pointers']} map pointers verified: {verdict}"
    )
