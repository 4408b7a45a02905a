"""A comparison's tables: Parquet files in its folder, asked with SQL.

| table   | one row per    | columns                                                                     |
| ------- | -------------- | --------------------------------------------------------------------------- |
| trials  | model and seed | model, seed, status, reason, val, test, steps, seconds, folder              |
| costs   | model          | model, params, macs, latency_ms, latency_iqr_ms, threads, memory, ...       |
| curves  | measured value | model, seed, step, epoch, split, name, value, seconds                       |
| scores  | good trial     | a view: the trials that ended well                                          |
| ranking | model          | a view: mean and spread of the scores, and the costs                        |

Differences between models are paired by seed: a seed fixes the order of batches and the random numbers of every model.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from opsin.errors import BadInput

TEXT, INT, FLOAT = pa.string(), pa.int64(), pa.float64()
SCHEMAS = {
    "trials": dict(
        model=TEXT, seed=INT, status=TEXT, reason=TEXT, val=FLOAT, test=FLOAT, steps=INT, seconds=FLOAT, folder=TEXT
    ),
    "costs": dict(
        model=TEXT, params=INT, macs=INT, latency_ms=FLOAT, latency_iqr_ms=FLOAT, threads=INT, memory=INT,
        train_memory=INT,
    ),
    "curves": dict(
        model=TEXT, seed=INT, step=INT, epoch=FLOAT, split=TEXT, name=TEXT, value=FLOAT, seconds=FLOAT
    ),
}  # fmt: skip
VIEWS = """
CREATE VIEW scores AS SELECT * FROM trials WHERE status = 'done' AND isfinite(val);
CREATE VIEW ranking AS
  SELECT t.model, count(s.seed) AS seeds, count(*) - count(s.seed) AS failed,
         avg(s.val) AS val, stddev_samp(s.val) AS val_sd, avg(s.test) AS test, stddev_samp(s.test) AS test_sd,
         avg(s.steps) AS steps, avg(s.seconds) AS seconds, any_value(c.params) AS params, any_value(c.macs) AS macs,
         any_value(c.latency_ms) AS latency_ms, any_value(c.latency_iqr_ms) AS latency_iqr_ms,
         any_value(c.memory) AS memory, any_value(c.train_memory) AS train_memory
  FROM trials t LEFT JOIN scores s USING (model, seed) LEFT JOIN costs c ON c.model = t.model
  GROUP BY t.model ORDER BY val DESC NULLS LAST, latency_ms;
"""


@dataclass(frozen=True)
class Difference:
    """How far a model is behind another, paired by seed. `low` and `high` bound the mean with 95 % confidence."""

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def within_error(self) -> bool:
        """Whether the data do not tell the two apart: the interval holds zero, or there is only one seed."""
        return not (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Row:
    """One model of the ranking: mean and sample standard deviation over seeds; costs of one image."""

    model: str
    seeds: int
    failed: int
    val: float | None
    val_sd: float | None
    test: float | None
    test_sd: float | None
    steps: float | None
    seconds: float | None
    params: int | None
    macs: int | None
    latency_ms: float | None
    latency_iqr_ms: float | None
    memory: int | None
    train_memory: int | None
    behind: Difference | None  # the best model's validation score less this one's

    @property
    def tied(self) -> bool:
        """Whether the difference to the best model is within the error; true of the best itself."""
        return self.val is not None and (self.behind is None or self.behind.within_error)


def write_table(folder: Path, name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Writes a table of `SCHEMAS` whole, so that a reader never sees half of it."""
    schema = pa.schema(list(SCHEMAS[name].items()))
    table = pa.Table.from_pylist([{k: _finite(v) for k, v in row.items()} for row in rows], schema=schema)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{name}.parquet"
    pq.write_table(table, partial)
    return partial.replace(folder / f"{name}.parquet")


def query(folder: Path, sql: str) -> list[dict[str, Any]]:
    """Asks the tables of a folder. Raises BadInput where the SQL is wrong."""
    with duckdb.connect() as connection:
        for name in SCHEMAS:
            file = str(folder / f"{name}.parquet").replace("'", "''")
            connection.execute(f"CREATE VIEW {name} AS SELECT * FROM read_parquet('{file}')")
        connection.execute(VIEWS)
        try:
            result = connection.execute(sql)
            names = [column[0] for column in result.description or []]
            return [dict(zip(names, row, strict=True)) for row in result.fetchall()]
        except duckdb.Error as error:
            tables = ", ".join([*SCHEMAS, "scores", "ranking"])
            raise BadInput(f"the query does not work on the tables {tables}: {str(error).splitlines()[0]}") from error


def ranking(folder: Path) -> list[Row]:
    """The models, best validation score first; models that failed on every seed come last."""
    rows = query(folder, "SELECT * FROM ranking")
    best = rows[0]["model"] if rows and rows[0]["val"] is not None else None
    return [Row(**row, behind=_behind(folder, best, row) if row["model"] != best else None) for row in rows]


def _behind(folder: Path, best: str | None, row: Mapping[str, Any]) -> Difference | None:
    if best is None or row["val"] is None:
        return None
    names = [name.replace("'", "''") for name in (best, row["model"])]
    pairs = query(
        folder,
        f"SELECT a.val - b.val AS d FROM scores a JOIN scores b USING (seed) "
        f"WHERE a.model = '{names[0]}' AND b.model = '{names[1]}'",
    )
    return difference([pair["d"] for pair in pairs])


def difference(differences: Sequence[float]) -> Difference | None:
    """Mean of paired differences and the 95 % interval of Student's t; None where there is no pair."""
    n = len(differences)
    if n == 0:
        return None
    mean = sum(differences) / n
    if n == 1:
        return Difference(mean, -math.inf, math.inf, 1)
    from scipy.stats import t

    error = math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1) / n)
    half = float(t.ppf(0.975, n - 1)) * error
    return Difference(mean, mean - half, mean + half, n)


def frontier(rows: Sequence[Row]) -> list[Row]:
    """The models that no other beats in accuracy without being slower (Pareto), fastest first."""
    front: list[Row] = []
    measured = [row for row in rows if row.val is not None and row.latency_ms is not None]
    for row in sorted(measured, key=lambda r: (r.latency_ms or 0, -(r.val or 0))):
        if not front or (row.val or 0) > (front[-1].val or 0):
            front.append(row)
    return front


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
