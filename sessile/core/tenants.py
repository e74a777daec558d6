"""Tenants: who asks, what each may take, and what each was served.

Step tokens are shared out by weight: every token that is planned is charged to its tenant, divided by the tenant's
weight, and who was charged least goes first. A tenant that comes back after a pause starts level with the least served
of those that are active, so that it can neither save up nor be punished (the virtual token counter of Sheng et al.,
"Fairness in Serving Large Language Models", 2024).
"""

from collections.abc import Sequence

from sessile.core.limits import TenantPolicy

_CHARGE = 1 << 20
"""What a token costs at weight 1: integers only, so that replays agree."""
SHARED_NAMESPACE = ""


class Tenant:
    """One tenant: its policy, and running counters that the audit recounts."""

    __slots__ = ("held_tokens", "index", "namespace", "policy", "requests", "served", "sessions", "tokens")

    def __init__(self, policy: TenantPolicy, index: int) -> None:
        self.policy = policy
        self.index = index
        """Position among all tenants; `RowTable.tenant` holds it."""
        shared = policy.shares_prefixes or not policy.name
        self.namespace = SHARED_NAMESPACE if shared else f"tenant {policy.name}"
        """Key of the prefix tree's root: nothing crosses from one to another (H71)."""
        self.requests = 0
        """Requests from submission to Done."""
        self.tokens = 0
        """Their input tokens, committed histories not included."""
        self.sessions = 0
        self.held_tokens = 0
        """Tokens of all its sessions' histories."""
        self.served = 0

    def charge(self, tokens: int) -> None:
        """Count tokens that a step runs for it."""
        self.served += self.cost_of(tokens)

    def cost_of(self, tokens: int) -> int:
        """What so many tokens are charged as."""
        return tokens * _CHARGE // self.policy.weight


class Tenants:
    """All tenants by name. One that no policy names is let in without limits of its own, at weight 1."""

    def __init__(self, policies: Sequence[TenantPolicy]) -> None:
        self._by_name: dict[str, Tenant] = {}
        self._all: list[Tenant] = []
        self.active = 0
        """How many have requests."""
        for policy in policies:
            self._add(policy)

    def named(self, name: str) -> Tenant:
        """The tenant of that name."""
        found = self._by_name.get(name)
        return self._add(TenantPolicy(name)) if found is None else found

    def at(self, index: int) -> Tenant:
        """The tenant with that index."""
        return self._all[index]

    @property
    def all(self) -> Sequence[Tenant]:
        """Every tenant, in the order of their indices."""
        return self._all

    def enter(self, tenant: Tenant, tokens: int) -> None:
        """Count a request of so many input tokens; a tenant that had none starts level with the least served."""
        if not tenant.requests:
            level = min([each.served for each in self._all if each.requests], default=tenant.served)
            tenant.served = max(tenant.served, level)
            self.active += 1
        tenant.requests += 1
        tenant.tokens += tokens

    def leave(self, tenant: Tenant, tokens: int) -> None:
        """Count the end of a request."""
        tenant.requests -= 1
        tenant.tokens -= tokens
        if not tenant.requests:
            self.active -= 1

    def _add(self, policy: TenantPolicy) -> Tenant:
        assert policy.name not in self._by_name, f"two policies for tenant {policy.name!r}"
        tenant = self._by_name[policy.name] = Tenant(policy, len(self._all))
        self._all.append(tenant)
        return tenant
