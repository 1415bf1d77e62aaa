"""Worlds of Box2D: rebuilt in a replica once an episode, then brought from state to state by the bytes that a step reads.

Bodies, fixtures, joints and contacts come in the order of the original's, as the solver goes through them in it, and the
broad phase knows them by the same boxes: a replica steps bit for bit as the original does.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from typing import Any, NamedTuple

from sb3_bridge.clones import box2d_memory as raw
from sb3_bridge.clones.copying import BASES, Memo, Unclonable, copy_value


class _State:
    """A world in a snapshot; ``data`` are the user's objects in it, by place."""

    def __init__(self, number: int, content: raw.World):
        self.number, self.content = number, content
        self.data: dict[raw.Place, Any] = {}


class _Live:
    """The world of a replica."""

    def __init__(self) -> None:
        self._known: dict[int, Any] = {}
        self._proxies: dict[tuple[Any, int], Any] = {}  # what pybox2d has, by kind and address
        self.world: Any = sys.modules["Box2D"].b2World()
        self.content = raw.read_world(self.world, self._known)
        start = raw.address(self.world.contactManager)
        self._callbacks = raw.read(start + raw.FILTER.start, 16)  # those of all worlds without the user's

    def proxy(self, place: raw.Place) -> Any:
        """What pybox2d has for a place, as the world is now."""
        if not place:
            return self.world
        kind, number, *more = place
        if kind == "joint":
            at, kind = self.content.joints[number].at, self.content.joints[number].made[0]
        else:
            body = self.content.bodies[number]
            at = body.fixtures[more[0]] if more else body.at
        if (kind, at) not in self._proxies:
            for body in self.world.bodies:
                self._proxies["body", raw.address(body)] = body
                self._proxies |= {("fixture", raw.address(fixture)): fixture for fixture in body.fixtures}
            self._proxies |= {(joint.type, raw.address(joint)): joint for joint in self.world.joints}
        return self._proxies[kind, at]

    def restore(self, wanted: raw.World) -> None:
        """Brings the world to a state, but for the user's objects."""
        start = raw.address(self.world.contactManager)
        # Callbacks must not hear of this: what they note is restored beside.
        for part in (raw.FILTER, raw.DESTRUCTION):
            raw.write(start + part.start, bytes(part.stop - part.start))
        self._rebuild(wanted)
        content, pairs = self.content, list(zip(self.content.bodies, wanted.bodies, strict=True))
        for contact in self.world.contacts:
            self.world.contactManager.Destroy(contact)
        for joint in content.joints:  # a contact may be older than a joint that forbids it
            raw.write(joint.at + raw.COLLIDE.start, b"\1")
        for (one, child, two, other), flags, manifold in wanted.contacts:
            sides = [content.bodies[number].fixtures[i] for _, number, i in (one, two)]
            self.world.contactManager.AddPair(raw.as_proxy(sides[0], child), raw.as_proxy(sides[1], other))
            at = raw.pointer(start + 88)
            if not at or struct.unpack("QQii", raw.read(at + 96, 24)) != (*sides, child, other):
                raise Unclonable("a contact cannot be made anew in a copy of its world")
            raw.write(at + raw.FLAGS.start, flags)
            raw.write(at + raw.MANIFOLD.start, manifold)
        for body, want in pairs:
            if want.made[0] or body.motion != want.motion or body.mass != want.mass:
                raw.write(body.at + raw.MOTION.start, want.motion)
                raw.write(body.at + raw.MASS.start, want.mass)
            if want.leaves != body.leaves:
                for at, mine, theirs in zip(body.proxies, body.leaves, want.leaves, strict=True):
                    raw.write(at, theirs[:16] + mine[16:28] + theirs[28:])
        self._restore_tree(wanted)
        for joint, want_joint in zip(content.joints, wanted.joints, strict=True):
            raw.write(joint.at + raw.COLLIDE.start, want_joint.made[3])
            raw.write(joint.at + raw.JOINT, want_joint.state)
        raw.write(start + raw.FILTER.start, self._callbacks)
        for part, setting in zip(raw.SETTINGS, wanted.settings, strict=True):
            raw.write(start + part.start, setting)

    def _rebuild(self, wanted: raw.World) -> None:
        """Makes bodies, fixtures and joints as they are wanted; the oldest ones are kept where they are alike."""
        mine = self.content = raw.read_world(self.world, self._known)
        n_bodies, n_joints = _n_alike(mine.bodies, wanted.bodies), _n_alike(mine.joints, wanted.joints)
        sizes = [(len(one.bodies), len(one.joints)) for one in (mine, wanted)]
        if (n_bodies, n_joints) == sizes[0] == sizes[1]:
            return
        lost = [number for number, joint in enumerate(mine.joints) if max(joint.made[1:3]) >= n_bodies]
        n_joints = min([n_joints, *lost])
        for number in reversed(range(n_joints, len(mine.joints))):
            self.world.DestroyJoint(self.proxy(("joint", number)))
        for number in reversed(range(n_bodies, len(mine.bodies))):
            self.world.DestroyBody(self.proxy(("body", number)))
        for want in wanted.bodies[n_bodies:]:
            kind, is_active, fixtures = want.made
            body = self.world.CreateBody(type=kind, active=bool(is_active))
            for *parts, made in fixtures:
                at = _add_fixture(body, raw.make_shape(made))
                for part, content in zip(raw.PARTS, parts, strict=True):
                    raw.write(at + part.start, content)
        box2d, bodies = sys.modules["Box2D"], self.world.bodies
        for kind, one, two, collide in [joint.made for joint in wanted.joints[n_joints:]]:
            make = getattr(box2d, f"b2{raw.JOINTS[kind]}JointDef")
            self.world.CreateJoint(
                make(bodyA=bodies[one], bodyB=bodies[two], collideConnected=collide != b"\0")
            )
        self._proxies.clear()
        self.content = raw.read_world(self.world, self._known)

    def _restore_tree(self, wanted: raw.World) -> None:
        """The broad phase, whose leaves point to what it knows of fixtures."""
        start = raw.address(self.world.contactManager)
        nodes, header = bytearray(wanted.tree.nodes), wanted.tree.header
        for body, want in zip(self.content.bodies, wanted.bodies, strict=True):
            for at, leaf in zip(body.proxies, want.leaves, strict=True):
                struct.pack_into("Q", nodes, raw.NODE * int.from_bytes(leaf[28:], "little") + 16, at)
        n_nodes, n_moved = len(nodes) // raw.NODE, len(wanted.tree.moved) // 4
        if raw.integer(start + 20) < n_nodes or raw.integer(start + 56) < n_moved:  # there is no room yet
            spare = self.world.CreateStaticBody()
            while raw.integer(start + 20) < n_nodes or raw.integer(start + 56) < n_moved:
                _add_fixture(spare, sys.modules["Box2D"].b2CircleShape())
            self.world.DestroyBody(spare)
        n_own = raw.integer(start + 20)
        if n_own > n_nodes:  # Box2D would add these, in the same order, where no node is free any more
            more = [*range(n_nodes + 1, n_own), -1]
            nodes += b"".join(struct.pack("24x4i", following, -1, -1, -1) for following in more)
            last, (free,) = -1, struct.unpack_from("i", header[2])
            while free >= 0:
                last, (free,) = free, struct.unpack_from("i", nodes, raw.NODE * free + 24)
            if last < 0:
                header = [*header[:2], struct.pack("i", n_nodes) + header[2][4:]]
            else:
                struct.pack_into("i", nodes, raw.NODE * last + 24, n_nodes)
        raw.write(raw.pointer(start + 8), bytes(nodes))
        for part, content in zip(raw.HEADER, header, strict=True):
            raw.write(start + part.start, content)
        raw.write(raw.pointer(start + 48), wanted.tree.moved)
        raw.write(start + 60, struct.pack("i", n_moved))


def _add_fixture(body: Any, shape: Any) -> int:
    """A fixture's address; it has a copy of the shape, which pybox2d would never free."""
    fixture = body.CreateFixture(sys.modules["Box2D"].b2FixtureDef(shape=shape))
    shape.thisown = True
    return raw.address(fixture)


def _n_alike(mine: list[Any], wanted: list[Any]) -> int:
    pairs = zip(mine, wanted, strict=False)
    return next(
        (i for i, (one, two) in enumerate(pairs) if one.made != two.made), min(len(mine), len(wanted))
    )


def _find_worlds(memo: Memo) -> None:
    """Notes what stands where in the worlds among an environment's attributes, and among those of its attributes."""
    raw.verify()
    box2d: Any = sys.modules["Box2D"]
    held = list(vars(memo["env"]).values())
    within = [one for one in held if hasattr(one, "__dict__") and not isinstance(one, type)]
    held += [value for one in within for value in vars(one).values()]
    worlds = {raw.address(one): one for one in held if isinstance(one, box2d.b2World)}
    found = memo["box2d"] = {}
    states = [_State(n, raw.read_world(one, memo["kept"])) for n, one in enumerate(worlds.values())]
    for at, state in zip(worlds, states, strict=True):
        found |= {at: (state, ()), **{part: (state, place) for part, place in state.content.places.items()}}
    for state in states:
        data = [(place, ctypes.cast(at, ctypes.py_object).value) for place, at in state.content.data() if at]
        state.data = {place: copy_value(value, memo) for place, value in data}


class _Part:
    """An object of pybox2d in a snapshot: it stands for a part of a world, or for nothing, or is a callback."""

    __slots__ = ("attributes", "kind", "place", "state")

    def __init__(self, kind: type, state: _State | None, place: raw.Place):
        self.kind, self.state, self.place = kind, state, place
        self.attributes: dict[str, Any] = {}


def _part(value: Any, memo: Memo) -> Any:
    if "box2d" not in memo:
        _find_worlds(memo)
    if id(value) in memo:  # a world refers to it
        return memo[id(value)]
    # What is in no world was destroyed: its copy stands for nothing, and cannot be used by mistake.
    state, place = memo["box2d"].get(raw.address(value), (None, ()))
    if state is None and isinstance(value, sys.modules["Box2D"].b2World):
        raise Unclonable(
            "its b2World is neither an attribute of the environment nor of one of its attributes"
        )
    return _with_attributes(_Part(type(value), state, place), value, memo)


def _callback(value: Any, memo: Memo) -> Any:
    return _with_attributes(_Part(type(value), None, ("callback",)), value, memo)


def _with_attributes(part: _Part, value: Any, memo: Memo) -> _Part:
    memo[id(value)] = part
    part.attributes.update(
        {name: copy_value(one, memo) for name, one in vars(value).items() if name != "this"}
    )
    return part


def _restored_part(part: _Part, memo: Memo) -> Any:
    kind: Any = part.kind
    state, place = part.state, part.place
    live = None if state is None else memo.get(id(state)) or _restored_world(state, memo)
    if id(part) in memo:  # the user's objects in a world may refer to it
        return memo[id(part)]
    result: Any = kind.__new__(kind) if live is None or place else live.world
    memo[id(part)] = result
    if place == ("callback",):
        next(base for base in kind.__mro__ if base.__module__.startswith("Box2D")).__init__(result)
    elif live is not None and place:
        result.this = live.proxy(place).this
    values = {name: copy_value(value, memo) for name, value in part.attributes.items()}
    if live is None or place:
        vars(result).update(values)
    else:
        result.__class__, result.__dict__ = kind, {"this": result.this, **values}
        for name, callback in list(values["_b2World__data"].items()):
            setattr(result, _CALLBACKS[name], callback)
    return result


_CALLBACKS = {"contact": "contactListener", "contactfilter": "contactFilter", "renderer": "renderer"}
_CALLBACKS["destruction"] = "destructionListener"


def _restored_world(state: _State, memo: Memo) -> _Live:
    lives = memo["kept"].setdefault("box2d", {})
    if state.number not in lives:
        lives[state.number] = _Live()
    live = memo[id(state)] = lives[state.number]
    live.restore(state.content)
    for place, at in live.content.data():
        if at or place in state.data:
            live.proxy(place).userData = copy_value(state.data.get(place), memo)
    return live


class _Definition(NamedTuple):
    """A definition of a fixture in a snapshot."""

    at: int
    shape: Any
    values: dict[str, Any]


_VALUES = "friction restitution density isSensor categoryBits maskBits groupIndex userData".split()  # noqa: SIM905


def _definition(value: Any, memo: Memo) -> Any:
    shape = None if value.shape is None else raw.read_shape(raw.address(value.shape))[0]
    return _Definition(
        raw.address(value), shape, {name: copy_value(getattr(value, name), memo) for name in _VALUES}
    )


def _restored_definition(part: _Definition, memo: Memo) -> Any:
    # pybox2d never frees a definition's shape: a replica keeps what it has.
    kept = memo["kept"].setdefault("definitions", {})
    if part.at not in kept:
        kept[part.at] = sys.modules["Box2D"].b2FixtureDef()
    result = kept[part.at]
    if part.shape is not None and (
        result.shape is None or raw.read_shape(raw.address(result.shape))[0] != part.shape
    ):
        if result.shape is not None:
            result.shape.thisown = True
        result.shape = raw.make_shape(part.shape)
    for name, value in part.values.items():
        setattr(result, name, copy_value(value, memo))
    return result


class _Shape(NamedTuple):
    """A shape in a snapshot."""

    made: Any


def _shape(value: Any, memo: Memo) -> Any:
    if not value.thisown:  # a change of it would be one of its fixture
        raise Unclonable(f"a {type(value).__name__} that belongs to a fixture cannot be copied")
    return _Shape(raw.read_shape(raw.address(value))[0])


def _refuse(value: Any, memo: Memo) -> Any:
    raise Unclonable(f"a {type(value).__name__} of Box2D cannot be copied")


def register() -> None:
    """Tells how objects of Box2D are copied, once it is loaded."""
    box2d: Any = sys.modules.get("Box2D")
    if box2d is None or _Part in BASES:
        return
    parts = (box2d.b2World, box2d.b2Body, box2d.b2Fixture, box2d.b2Joint)
    copiers: dict[Any, Any] = {
        kind: _callback for kind in vars(box2d).values() if hasattr(kind, "__disown__")
    }
    copiers |= dict.fromkeys((box2d.b2Draw, box2d.b2DrawExtended), lambda value, memo: None)
    copiers |= {**dict.fromkeys(parts, _part), box2d.b2FixtureDef: _definition, box2d.b2Shape: _shape}
    copiers |= dict.fromkeys((box2d.b2Vec2, box2d.b2Vec3), lambda value, memo: value.copy())
    for kind in vars(box2d).values():
        if isinstance(kind, type) and kind.__module__.startswith("Box2D"):
            BASES[kind] = next((copiers[base] for base in kind.__mro__ if base in copiers), _refuse)
    BASES[_Part], BASES[_Definition] = _restored_part, _restored_definition
    BASES[_Shape] = lambda value, memo: raw.make_shape(value.made)
