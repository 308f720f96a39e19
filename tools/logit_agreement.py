"""Do two programs compute the same model? Their logits on the same tokens, against the reference's own rounding noise.

Equal top tokens alone say little: where the best logits are closer together than rounding moves them, two correct programs
choose differently. So the reference program runs twice, the second time rounding in other places. The other program must be no
farther from the first run than a few times the second run is. A fault that changes less than rounding does can't be seen this way.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float64]

KL_LIMIT = 4.0
"""Most times the noise that the typical KL may be. KL varies by position, by a factor of about 4 either way, so that the ratio of
two geometric means over 17 positions is uncertain by a factor of 1.6; 4 is three times that uncertainty."""
KL_FLOOR = 1e-4
"""Nats that are no fault even where the reference's two runs are bit-identical: the programs round activations differently."""
NOISE_LIMIT = 0.2
"""Nats of noise from which the comparison shows nothing: a model with one layer in ten wrong is closer to the right one."""
DECIDED = 3.0
"""A position is decided if the reference's two best logits are farther apart than so many standard deviations of what rounding does
to the difference of two logits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How far apart two programs are. KL in nats, logit differences as root mean squares over the vocabulary.

    Attributes:
        positions: compared.
        argmax_share: of positions with the same best token.
        noise_argmax_share: the same between the reference's two runs.
        decided: positions at which rounding can't change the best token.
        decided_share: of those with the same best token; 1.0 if there are none.
        mean_kl, noise_mean_kl: of the reference's first run from the other program, and from its own second run.
        typical_kl, noise_typical_kl: the same as geometric means, which single positions don't dominate.
        difference, noise: of logits.
        correlation: of all logits.
    """

    positions: int
    argmax_share: float
    noise_argmax_share: float
    decided: int
    decided_share: float
    mean_kl: float
    noise_mean_kl: float
    typical_kl: float
    noise_typical_kl: float
    difference: float
    noise: float
    correlation: float

    def fault(self, min_agreement: float) -> str | None:
        """Why the programs can't be taken for the same; None if they can.

        Args:
            min_agreement: least share of decided positions with the same best token.
        """
        if not np.isfinite([self.mean_kl, self.noise_mean_kl, self.correlation]).all():
            return "logits are not finite"
        if self.noise_typical_kl > NOISE_LIMIT:
            return f"the reference's own rounding noise is {self.noise_typical_kl:.2g} nats, which hides any fault"
        limit = max(KL_FLOOR, KL_LIMIT * self.noise_typical_kl)
        if self.typical_kl > limit:
            return f"typical KL {self.typical_kl:.2g} above {limit:.2g}, {KL_LIMIT:g} times the rounding noise"
        if self.decided_share < min_agreement:
            return f"the best token is another at {1 - self.decided_share:.0%} of {self.decided} decided positions"
        return None

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"logits : typical KL {self.typical_kl:.2g}, mean {self.mean_kl:.2g}, difference {self.difference:.2g}, "
            f"correlation {self.correlation:.5f}; argmax equal at {self.argmax_share:.1%} of {self.positions} positions",
            f"noise  : typical KL {self.noise_typical_kl:.2g}, mean {self.noise_mean_kl:.2g}, difference {self.noise:.2g} "
            f"between two runs of llama.cpp; argmax equal at {self.noise_argmax_share:.1%}",
            f"decided: {self.decided} of {self.positions} positions have a margin beyond the noise; "
            + (f"argmax equal at {self.decided_share:.1%} of them" if self.decided else "argmax proves nothing here"),
        ]


def compare(first: Logits, second: Logits, other: Logits) -> Agreement:
    """Compares logits (n_positions, n_vocab).

    Args:
        first, second: two runs of the reference program.
        other: the other program's.
    """
    first, second, other = (x.astype(np.float64) for x in (first, second, other))
    best = first.argmax(-1)
    kl, noise_kl = _kl(first, other), _kl(first, second)
    spread = _centred(second - first).std(-1)
    noise = float(np.sqrt((spread**2).mean()))
    top = np.partition(first, -2, axis=-1)[:, -2:]
    # Two logits' errors add up; some positions are noisier than others.
    decided = top[:, 1] - top[:, 0] > DECIDED * np.sqrt(2) * np.maximum(spread, noise)
    same = best == other.argmax(-1)
    return Agreement(
        positions=len(first),
        argmax_share=float(same.mean()),
        noise_argmax_share=float((best == second.argmax(-1)).mean()),
        decided=int(decided.sum()),
        decided_share=float(same[decided].mean()) if decided.any() else 1.0,
        mean_kl=float(kl.mean()),
        noise_mean_kl=float(noise_kl.mean()),
        typical_kl=_typical(kl),
        noise_typical_kl=_typical(noise_kl),
        difference=float(np.sqrt((_centred(other - first) ** 2).mean())),
        noise=noise,
        correlation=float(np.corrcoef(first.ravel(), other.ravel())[0, 1]),
    )


def _centred(x: Logits) -> Logits:
    """A constant added to all logits of a position changes no probability."""
    centred: Logits = x - x.mean(-1, keepdims=True)
    return centred


def _kl(a: Logits, b: Logits) -> Logits:
    log_p, log_q = (x - x.max(-1, keepdims=True) for x in (a, b))
    log_p, log_q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (log_p, log_q))
    result: Logits = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    return result


def _typical(kl: Logits) -> float:
    """Geometric mean; what is below rounding of the sum itself counts as that."""
    return float(np.exp(np.log(np.maximum(kl, 1e-12)).mean()))
