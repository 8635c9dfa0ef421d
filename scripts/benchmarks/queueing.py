"""What random arrivals alone cost before a server whose every request takes as long: M/D/1.

The waiting time's distribution is Erlang's: P(W <= t) = (1 - r) sum_{k=0}^{floor(t/d)}
(-x_k)^k / k! e^{x_k} with x_k = a (t - k d), for arrivals at rate a, a service of d and r = a d
(A. K. Erlang, 1909; in this form in V. B. Iversen and L. Staalhagen, Waiting time distribution in
M/D/1 queueing systems, Electronics Letters 35 (25), 1999). Its terms alternate and grow, so they
are added up with many digits.
"""

from __future__ import annotations

from decimal import Decimal, localcontext

_DIGITS = 80


def waits_at_most(limit_s: float, rate: float, service_s: float) -> float:
    """The share of requests that wait at most `limit_s` seconds before their service begins."""
    load = rate * service_s
    if limit_s < 0 or load >= 1:
        return 0.0
    with localcontext() as context:
        context.prec = _DIGITS
        arrivals, limit, service = Decimal(rate), Decimal(limit_s), Decimal(service_s)
        total, factorial = Decimal(0), Decimal(1)
        for number in range(int(limit / service) + 1):
            factorial *= max(1, number)
            x = arrivals * (limit - number * service)
            power = (-x) ** number if number else Decimal(1)
            total += power / factorial * x.exp()
        return float((1 - arrivals * service) * total)


def rate_kept_up(rate: float, num_requests: float, limit_s: float) -> float:
    """The least that a server may do each second if of `num_requests` that came at `rate` none has
    waited longer than `limit_s`.

    It may be less than `rate`, as a line may grow until they have all come.
    """
    return rate / (1 + rate * limit_s / num_requests)


def rate_bound(service_s: float, limit_s: float, share: float, num_cores: int = 1) -> float:
    """The highest rate at which `share` of requests have waited and been served within `limit_s`.

    Cores beyond one are taken as one server that is as many times as fast, which no real division
    of the work among them can beat. Only the prompts are counted: whatever decoding takes of the
    same cores comes on top. 0 if a request alone takes longer than `limit_s`.
    """
    service_s /= num_cores
    low, high = 0.0, 1 / service_s
    for _ in range(50):
        middle = (low + high) / 2
        if waits_at_most(limit_s - service_s, middle, service_s) >= share:
            low = middle
        else:
            high = middle
    return low
