"""Which backups a retention rule keeps (pure).

As restic, Borg and Kopia count: each rule keeps the newest backup of each of the last N periods that
have one; a backup kept by any rule stays. Periods are those of UTC; weeks are ISO weeks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime

from backupfs.errors import InvalidOption
from backupfs.format.record import Record


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionPolicy:
    """How many backups to keep of each volume, by rule; 0 means that the rule keeps none."""

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0


def check_policy(policy: RetentionPolicy) -> None:
    """Refuse a policy that would delete everything, or that cannot be meant.

    Raises: InvalidOption.
    """
    for rule, count in asdict(policy).items():
        if count < 0:
            raise InvalidOption(option=f"keep {rule}", reason="a number from 0")
    if not any(asdict(policy).values()):
        raise InvalidOption(option="keep", reason="at least one rule must keep a backup")


def _week(moment: datetime) -> str:
    year, week, _day = moment.isocalendar()
    return f"{year}-{week}"


_PERIODS: tuple[tuple[str, Callable[[datetime], str]], ...] = (
    ("hourly", lambda moment: moment.strftime("%Y-%m-%d %H")),
    ("daily", lambda moment: moment.strftime("%Y-%m-%d")),
    ("weekly", _week),
    ("monthly", lambda moment: moment.strftime("%Y-%m")),
    ("yearly", lambda moment: moment.strftime("%Y")),
)


def kept_ids(backups: Sequence[Record], policy: RetentionPolicy, now: datetime) -> set[str]:
    """Ids that ``policy`` keeps of one volume's backups, given oldest first.

    Those dated after ``now`` stay and do not count: a clock that was ahead must not cost the backups
    that were made since.
    """
    kept = {record.backup_id for record in backups if record.data_timestamp > now}
    newest_first = [record for record in reversed(backups) if record.backup_id not in kept]
    kept.update(record.backup_id for record in newest_first[: policy.last])
    for rule, period_of in _PERIODS:
        count = getattr(policy, rule)
        periods: set[str] = set()
        for record in newest_first:
            period = period_of(record.data_timestamp)
            if period in periods:
                continue
            if len(periods) == count:
                break
            periods.add(period)
            kept.add(record.backup_id)
    return kept
