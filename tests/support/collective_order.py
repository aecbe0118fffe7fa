"""The events of all ranks replayed together: does every rank come to its end?

Events are those of `recorded_world`. The rules are stricter than any backend's: a collective, and
the making of a group, ends when all members have arrived at it; a batch of sends and receives when
each has met its partner, in the order in which the two ranks post them. Nothing is buffered, and a
rank does one event at a time. So ranks that wait for one another in a circle are found, also where
gloo would let them pass.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence

from tests.support.recorded_world import Event


def problems(records: Sequence[Sequence[Event]], shown: int = 4) -> list[str]:
    """Return what goes wrong when all ranks run: operations that differ, ranks that never end.

    Args:
        records: the events of each rank of the world.
        shown: ranks that are listed, of those that wait for ever.
    """
    replay = _Replay(records)
    replay.run()
    if replay.found:
        return replay.found
    stuck = [rank for rank, at in enumerate(replay.at) if at < len(records[rank])]
    return [
        f"rank {rank} waits for ever in event {replay.at[rank]}: {records[rank][replay.at[rank]]}"
        for rank in stuck[:shown]
    ]


class _Replay:
    def __init__(self, records: Sequence[Sequence[Event]]) -> None:
        self.records = records
        self.at = [0] * len(records)
        self.found: list[str] = []
        self._members: dict[str, tuple[int, ...]] = {}
        self._arrived: dict[tuple[str, str], dict[int, Event]] = defaultdict(dict)
        # (group, from, to) -> sends, receives that wait for their partner: rank, size.
        self._posted: dict[tuple[str, int, int], dict[str, deque]] = defaultdict(
            lambda: {"send": deque(), "recv": deque()}
        )
        self._open = [0] * len(records)  # operations of the present batch without a partner

    def run(self) -> None:
        ready = deque(range(len(self.records)))
        while ready and not self.found:
            rank = ready.popleft()
            if self.at[rank] == len(self.records[rank]):
                continue
            event = self.records[rank][self.at[rank]]
            freed = self._batch(rank, event) if event[0] == "batch" else self._all(rank, event)
            for one in freed:
                self.at[one] += 1
                ready.append(one)

    def _all(self, rank: int, event: Event) -> list[int]:
        """Let `rank` arrive at a collective; return the ranks that leave it."""
        kind, name = event[:2]
        if kind == "group":
            self._members[name] = event[2]
        # A name that no rank made is the world's.
        members = self._members.get(name, range(len(self.records)))
        place = (kind if kind == "group" else "", name)
        arrived = self._arrived[place]
        arrived[rank] = event
        if len(arrived) < len(members):
            return []
        del self._arrived[place]
        self._compare(members, arrived)
        return list(arrived)

    def _compare(self, members: Sequence[int], arrived: dict[int, Event]) -> None:
        if set(arrived) != set(members):
            self.found.append(f"group of {list(members)}: {sorted(arrived)} arrived")
            return
        first = arrived[members[0]]
        for rank in members:
            other = arrived[rank]
            if first[0] == "split" == other[0]:
                sent = [arrived[one][2][members.index(rank)] for one in members]
                if list(other[3]) != sent:
                    self.found.append(f"rank {rank} expects {other[3]}, is sent {sent}")
            elif other != first:
                self.found.append(f"rank {members[0]}: {first}, rank {rank}: {other}")
                return

    def _batch(self, rank: int, event: Event) -> list[int]:
        """Post a batch; return the ranks all of whose operations have met their partners."""
        self._open[rank] = len(event[1])
        freed = []
        for name, direction, peer, size in event[1]:
            ends = (rank, peer) if direction == "send" else (peer, rank)
            queues = self._posted[name, *ends]
            partners = queues["recv" if direction == "send" else "send"]
            if not partners:
                queues[direction].append((rank, size))
                continue
            partner, other = partners.popleft()
            if other != size:
                self.found.append(f"{ends[0]} to {ends[1]}: {size} here, {other} there")
            for one in (rank, partner):
                self._open[one] -= 1
                if self._open[one] == 0:
                    freed.append(one)
        return freed
