"""What dishonest or broken clients send; `matrix` tries every attack on every fusion rule."""

from fedkd.knowledge.query import Reply
from fedkd.registry import Registry

#: Functions `(sent, scene, *, options) -> reply`: the honest message and what the attacker knows
#: become what is sent; a result of None is silence.
ATTACKS: Registry[Reply | None] = Registry("attack", "fedkd.attacks")
