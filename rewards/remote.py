"""Any reward of another environment or machine, behind `diffalign serve-reward` there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import AfterValidator, Field

from diffalign.rewards import Head, Reward
from diffalign.rewards._pool import Pool
from diffalign.rewards._server import Failed, Server, request
from diffalign.rewards._wire import Refused, line, question, read_answer
from diffalign.types import RewardOutput, UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Remote(Reward):
    """The scores of the reward behind `url`; `rewards/_wire.py` states the protocol, for servers of your own.

    Images travel with 8 bits a channel. A request that fails after all repetitions makes its images invalid, with the
    reason in `error`. No gradient.
    """

    url: Annotated[str, AfterValidator(lambda url: Server._root(url))]
    """Address of the server, such as http://127.0.0.1:8600."""
    timeout: float = Field(60.0, gt=0)
    """Seconds to wait for an answer."""
    retries: int = Field(2, ge=0)
    """How often a request that failed is sent again."""
    backoff: float = Field(1.0, ge=0)
    """Seconds before the first repetition; each further one waits twice as long."""
    concurrency: int = Field(4, ge=1)
    """Requests under way at once."""
    batch: int = Field(8, ge=1)
    """Images in one request."""
    key_env: str | None = None
    """Environment variable that holds the token which the server was started with."""

    remote: ClassVar[bool] = True

    def setup(self, device: torch.device | str) -> Head:
        """Raises UserError when no reward server answers at `url`."""
        server = Server(
            url=self.url,
            timeout=self.timeout,
            retries=self.retries,
            backoff=self.backoff,
            concurrency=self.concurrency,
            key_env=self.key_env,
        )
        try:
            told = request(server, "/health")
        except Failed as error:
            raise UserError(f"{line(error)}; start `diffalign serve-reward` there, or mend url and key_env") from error
        largest = told.get("largest") if isinstance(told, dict) else None
        if type(largest) is not int or largest < 1:
            raise UserError(f"{self.url} is no reward server; start `diffalign serve-reward` there")
        return Caller(server, self.batch, largest, Pool(self.concurrency))


@dataclass(frozen=True)
class Caller:
    server: Server
    batch: int
    largest: int  # bytes of a body that the server takes
    pool: Pool

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> RewardOutput:
        import torch

        def ask(start: int) -> tuple[list[float], list[bool], list[str | None]]:
            part = slice(start, start + self.batch)
            return self._ask(images[part], prompts[part], metadata[part])

        told = self.pool.map(ask, range(0, len(images), self.batch))
        scores, valid, errors = ([v for part in told for v in part[k]] for k in range(3))
        return RewardOutput(torch.tensor(scores), {"error": errors}, torch.tensor(valid))

    def _ask(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> tuple[list[float], list[bool], list[str | None]]:
        n = len(images)
        try:
            body = question(images, prompts, metadata)
            if len(body) > self.largest:
                raise Refused(f"{n} images are {len(body)} bytes, the server takes {self.largest}; lower `batch`")
            return read_answer(request(self.server, "/score", body), n)
        except (Failed, Refused) as error:
            said = line(error)
        return [float("nan")] * n, [False] * n, [said] * n
