"""What dishonest or broken clients send; `matrix` tries every attack on every fusion rule."""

from fedkd.attacks.base import Payload
from fedkd.registry import Registry

#: Functions `(payload, scene, *, options) -> payload`; a result of None is silence.
ATTACKS: Registry[Payload | None] = Registry("attack", "fedkd.attacks")
