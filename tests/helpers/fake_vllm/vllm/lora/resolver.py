"""Stands for vLLM's module of this name: the interface of a resolver and where it is registered."""

from abc import ABC, abstractmethod


class LoRAResolver(ABC):
    @abstractmethod
    async def resolve_lora(self, base_model_name, lora_name): ...


class _Registry:
    def __init__(self):
        self.resolvers = {}

    def get_supported_resolvers(self):
        return self.resolvers.keys()

    def register_resolver(self, resolver_name, resolver):
        self.resolvers[resolver_name] = resolver

    def get_resolver(self, resolver_name):
        return self.resolvers[resolver_name]


LoRAResolverRegistry = _Registry()
