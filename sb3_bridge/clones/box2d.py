"""Worlds of Box2D: rebuilt in a replica once, then brought from state to state by the bytes that a step reads.

pybox2d shows positions and velocities, but not what else decides a step: which contacts touched, the impulses that a
solver starts from, for how long a body has rested. They are read where Box2D keeps them in memory; :func:`_verify` finds
out in a world of its own whether they are where this module looks, else environments are refused.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import gymnasium

from sb3_bridge.clones.copying import BASES, Memo, Unclonable, copy_value

_read, _write = ctypes.string_at, ctypes.memmove
# Offsets in bytes, of Box2D 2.3 on a machine with 64 bits.
_BODY, _MOTION, _MASS = 184, slice(0, 88), slice(144, 176)  # type to torque; mass to sleep time
_FIXTURE, _PARTS = 72, (slice(0, 4), slice(32, 40), slice(52, 59))  # density; friction, restitution; filter, sensor
_CHAIN = 3  # the type of shape
_JOINT = 128  # of what all joints have
_CONTACT, _FLAGS, _MANIFOLD = 204, slice(8, 12), slice(120, 204)  # manifold to tangent speed
_SETTINGS = (slice(-8, -4), slice(152, 161), slice(184, 192))  # of a world, from its contact manager on


class _Body(NamedTuple):
    at: int
    made: Any  # what it was made with: type, active or not, fixtures
    motion: bytes
    mass: bytes
    fixtures: list[int]
    nodes: list[int]  # of the broad phase's tree, of all fixtures and their children
    data: list[int]  # addresses of the user's objects, of the body and of its fixtures


class _Joint(NamedTuple):
    at: int
    made: Any  # type, its bodies, whether they collide
    state: bytes
    data: list[int]


class _Contact(NamedTuple):
    at: int
    between: tuple[Any, ...]  # two times body, fixture, child
    flags: bytes
    manifold: bytes


class _Walk(NamedTuple):
    """All that a world holds, oldest first."""

    boxes: list[bytes]  # around what moves, with some room: where two of them meet, there is a contact
    settings: list[bytes]
    bodies: list[_Body]
    joints: list[_Joint]
    contacts: list[_Contact]
    places: dict[int, tuple[Any, ...]]  # by address: which body, or which of its fixtures, or which joint


def _address(proxy: Any) -> int:
    return int(proxy.this)


def _pointer(at: int) -> int:
    return ctypes.c_uint64.from_address(at).value


def _chain(at: int, size: int, following: int) -> list[tuple[int, bytes]]:
    """The objects of a linked list, oldest first: Box2D puts the newest at its head."""
    found = []
    while at:
        found.append((at, _read(at, size)))
        (at,) = struct.unpack_from("Q", found[-1][1], following)
    return found[::-1]


def _shape(at: int) -> tuple[tuple[Any, ...], list[tuple[int, bytes]]]:
    """What a shape was made with, and where that is."""
    (kind,) = struct.unpack("i", _read(at + 8, 4))
    sizes = (24, 50, 28 + 16 * sys.modules["Box2D"].b2_maxPolygonVertices, 46)
    if not 0 <= kind < len(sizes):
        raise Unclonable(f"a fixture's shape is of an unknown type ({kind})")
    content = [(at + 12, _read(at + 12, sizes[kind] - 12))]
    if kind != _CHAIN:
        return (kind, content[0][1]), content
    vertices, n_vertices = struct.unpack_from("QI", content[0][1], 4)  # it owns them
    content.append((vertices, _read(vertices, 8 * n_vertices)))
    return (kind, content[0][1][16:], content[1][1]), content


def _make_shape(made: tuple[Any, ...]) -> Any:
    box2d: Any = sys.modules["Box2D"]
    kinds = (box2d.b2CircleShape, box2d.b2EdgeShape, box2d.b2PolygonShape, box2d.b2ChainShape)
    shape = kinds[made[0]]()
    if made[0] == _CHAIN:
        shape.vertices_chain = list(struct.iter_unpack("2f", made[2]))
    _write(_address(shape) + (28 if made[0] == _CHAIN else 12), made[1], len(made[1]))
    return shape


def _walk(world: Any, known: dict[int, Any]) -> _Walk:
    """Reads a world; ``known`` are bodies by address, which are used again where nothing in them changed."""
    manager = _address(world.contactManager)
    places: dict[int, tuple[Any, ...]] = {}
    bodies, joints, contacts = [], [], []
    for number, (at, raw) in enumerate(_chain(_pointer(manager + 128), _BODY, 104)):
        key, motion, mass = (raw[112:124], raw[4] & 32, raw[176:]), raw[_MOTION], raw[_MASS]
        old_key, parts, body = known.get(at, (None, (), None))
        if key != old_key or any(_read(part, len(content)) != content for part, content in parts):
            fixtures = _chain(_pointer(at + 112), _FIXTURE, 8)
            shapes = [_shape(struct.unpack_from("Q", one, 24)[0]) for _, one in fixtures]
            made = [(*(one[part] for part in _PARTS), shape[0]) for (_, one), shape in zip(fixtures, shapes, strict=True)]
            leaves = [struct.unpack_from("QI", one, 40) for _, one in fixtures]
            leaves = [(start, _read(start, 32 * count)) for start, count in leaves]
            nodes = [node for _, content in leaves for (node,) in struct.iter_unpack("28xI", content)]
            data = [_pointer(at + 176), *(struct.unpack_from("Q", one, 64)[0] for _, one in fixtures)]
            body = _Body(at, (raw[0], key[1], made), motion, mass, [place for place, _ in fixtures], nodes, data)
            parts = [*fixtures, *leaves, *(one for _, content in shapes for one in content)]
        elif body.motion != motion or body.mass != mass:
            body = body._replace(motion=motion, mass=mass)
        known[at] = key, parts, body
        bodies.append(body)
        places[at] = ("body", number)
        for i, place in enumerate(body.fixtures):
            places[place] = ("fixture", number, i)
    for number, (at, raw) in enumerate(_chain(_pointer(manager + 136), _JOINT, 24)):
        kind, (one, two) = raw[8], struct.unpack_from("2Q", raw, 96)
        places[at] = ("joint", number)
        made = (kind, places[one][1], places[two][1], bool(raw[117]))
        joints.append(_Joint(at, made, _read(at + _JOINT, _joint_size(kind) - _JOINT), [_pointer(at + 120)]))
    for at, raw in _chain(_pointer(manager + 88), _CONTACT, 24):
        one, two, child, other = struct.unpack_from("QQii", raw, 96)
        contacts.append(_Contact(at, (places[one], child, places[two], other), raw[_FLAGS], raw[_MANIFOLD]))
    tree = _pointer(manager + 8)
    boxes = [_read(tree + 40 * node, 16) for body in bodies if body.made[0] for node in body.nodes]
    return _Walk(boxes, [_read(manager + part.start, part.stop - part.start) for part in _SETTINGS], bodies, joints, contacts, places)


_JOINTS = dict(enumerate("Revolute Prismatic Distance Pulley Mouse Gear Wheel Weld Friction Rope Motor".split(), 1))


@functools.cache
def _joint_size(kind: int) -> int:
    """Bytes of Box2D's block for a joint: the distance of two that are made one after the other."""
    box2d: Any = sys.modules["Box2D"]
    name = f"b2{_JOINTS.get(kind, 'Unknown')}Joint"
    if kind not in _JOINTS or name == "b2GearJoint":  # it refers to other joints, and to their bodies
        raise Unclonable(f"a {name} cannot be rebuilt in a copy of its world")
    world = box2d.b2World()
    ends = {"bodyA": world.CreateDynamicBody(), "bodyB": world.CreateDynamicBody()}
    joints = [world.CreateJoint(getattr(box2d, f"{name}Def")(**ends)) for _ in range(2)]
    return abs(_address(joints[1]) - _address(joints[0]))


class _State:
    """A world, as a snapshot keeps it; ``data`` are copies of the user's objects in it, by place."""

    def __init__(self, number: int, walk: _Walk):
        self.number, self.walk = number, walk
        self.data: dict[tuple[Any, ...], Any] = {}


class _World:
    """A replica's world."""

    def __init__(self) -> None:
        self.world: Any = sys.modules["Box2D"].b2World()
        self._known: dict[int, Any] = {}
        self.mine = _walk(self.world, self._known)
        self._proxies: dict[tuple[Any, int], Any] = {}  # by kind and address

    def proxy(self, place: tuple[Any, ...]) -> Any:
        """What pybox2d has for a place, as it is now."""
        if not place:
            return self.world
        if place[0] == "joint":
            return self._found(*self.mine.joints[place[1]].made[:1], self.mine.joints[place[1]].at)
        body = self.mine.bodies[place[1]]
        return self._found(place[0], body.at if place[0] == "body" else body.fixtures[place[2]])

    def _found(self, kind: Any, at: int) -> Any:
        if (kind, at) not in self._proxies:
            for body in self.world.bodies:
                self._proxies["body", _address(body)] = body
                self._proxies |= {("fixture", _address(one)): one for one in body.fixtures}
            self._proxies |= {(one.type, _address(one)): one for one in self.world.joints}
        return self._proxies[kind, at]

    def restore(self, wanted: _Walk) -> None:
        """All but the user's objects."""
        self.world.contactListener = None  # what it noted is restored beside
        self._rebuild(wanted)
        manager = self.world.contactManager
        start = _address(manager)
        pairs = list(zip(self.mine.bodies, wanted.bodies, strict=True))
        for number, (body, want) in enumerate(pairs):
            if want.made[0] or body.motion != want.motion:
                x, y, angle = struct.unpack("2f36xf", want.motion[12:60])
                self.proxy(("body", number)).transform = (x, y), angle
        tree = _pointer(start + 8)
        moving = [node for body in self.mine.bodies if body.made[0] for node in body.nodes]
        for node, box in zip(moving, wanted.boxes, strict=True):
            if _read(tree + 40 * node, 16) != box:
                self._move(node, (1e9, 1e9, 1e9, 1e9))  # a box that holds another one would stay as it is
                self._move(node, struct.unpack("4f", box))
                _write(tree + 40 * node, box, 16)
        for contact in self.world.contacts:
            manager.Destroy(contact)
        for number, (body, want) in enumerate(pairs):
            for i in range(len(body.fixtures) if want.made[0] else 0):  # from these, others are looked for later
                self.proxy(("fixture", number, i)).Refilter()
        for contact in wanted.contacts:
            (_, one, i), child, (_, two, j), other = contact.between
            sides = (self.mine.bodies[one].fixtures[i], child), (self.mine.bodies[two].fixtures[j], other)
            manager.AddPair(*(_proxy_of(*side) for side in sides))
            at = _pointer(start + 88)
            if not at or struct.unpack("QQii", _read(at + 96, 24)) != (sides[0][0], sides[1][0], child, other):
                raise Unclonable("a contact cannot be made anew in a copy of its world")
            _write(at + _FLAGS.start, contact.flags, 4)
            _write(at + _MANIFOLD.start, contact.manifold, len(contact.manifold))
        for body, want in pairs:
            if want.made[0] or body[2:4] != want[2:4]:
                _write(body.at + _MOTION.start, want.motion, len(want.motion))
                _write(body.at + _MASS.start, want.mass, len(want.mass))
        for joint, theirs in zip(self.mine.joints, wanted.joints, strict=True):
            _write(joint.at + _JOINT, theirs.state, len(theirs.state))
        for part, setting in zip(_SETTINGS, wanted.settings, strict=True):
            _write(start + part.start, setting, len(setting))

    def _rebuild(self, wanted: _Walk) -> None:
        """Bodies, fixtures and joints as they are wanted, in the same order; the oldest of them are kept if they will do."""
        self.mine = mine = _walk(self.world, self._known)
        n_bodies = _n_alike(mine.bodies, wanted.bodies)
        n_joints = _n_alike(mine.joints, wanted.joints)
        if n_bodies == len(mine.bodies) == len(wanted.bodies) and n_joints == len(mine.joints) == len(wanted.joints):
            return
        if 2 * n_bodies < len(wanted.bodies):  # a new world numbers what it gets as the wanted one did
            n_bodies, self.world = 0, sys.modules["Box2D"].b2World()
            mine = _walk(self.world, {})
        lost = [number for number, one in enumerate(mine.joints) if max(one.made[1:3]) >= n_bodies]
        n_joints = min([n_joints, len(mine.joints), *lost])
        for number in reversed(range(n_joints, len(mine.joints))):
            self.world.DestroyJoint(self.proxy(("joint", number)))
        for number in reversed(range(n_bodies, len(mine.bodies))):
            self.world.DestroyBody(self.proxy(("body", number)))
        self._make_bodies(wanted.bodies[n_bodies:])
        bodies = self.world.bodies
        box2d: Any = sys.modules["Box2D"]
        for kind, one, two, collide in [joint.made for joint in wanted.joints[n_joints:]]:
            make = getattr(box2d, f"b2{_JOINTS[kind]}JointDef")
            self.world.CreateJoint(make(bodyA=bodies[one], bodyB=bodies[two], collideConnected=collide))
        self._proxies.clear()
        self.mine = _walk(self.world, self._known)

    def _move(self, node: int, box: tuple[float, ...]) -> None:
        left, low, right, high = box  # Box2D adds a tenth on each side
        box2d: Any = sys.modules["Box2D"]
        inner = box2d.b2AABB(lowerBound=(left + 0.1, low + 0.1), upperBound=(right - 0.1, high - 0.1))
        self.world.contactManager.broadPhase.MoveProxy(node, inner, (0, 0))

    def _make_bodies(self, wanted: list[_Body]) -> None:
        box2d: Any = sys.modules["Box2D"]
        fixtures = []
        for want in wanted:
            x, y, angle = struct.unpack("2f36xf", want.motion[12:60])
            active, latest = bool(want.made[1]), 0
            body = self.world.CreateBody(type=want.made[0], active=active, position=(x, y), angle=angle)
            nodes = iter(want.nodes)
            for made in want.made[2]:
                latest = max(latest, next(nodes, 0))
                fixtures.append((latest, len(fixtures), body, made))
        # Contacts that begin together are sorted by the numbers of nodes, which follow this order.
        for _, _, body, (*parts, made) in sorted(fixtures, key=lambda one: one[:2]):
            shape = _make_shape(made)
            at = _address(body.CreateFixture(box2d.b2FixtureDef(shape=shape)))
            shape.thisown = True  # the fixture has a copy; pybox2d would never free this one
            for part, content in zip(_PARTS, parts, strict=True):
                _write(at + part.start, content, len(content))


def _n_alike(mine: list[Any], wanted: list[Any]) -> int:
    pairs = zip(mine, wanted, strict=False)
    return next((i for i, (one, two) in enumerate(pairs) if one.made != two.made), min(len(mine), len(wanted)))


def _proxy_of(fixture: int, child: int) -> complex:
    """What ``AddPair`` reads as a proxy of the broad phase: pybox2d hands it a Python object's own address."""
    content = struct.pack("Qii", fixture, child, 0)
    return complex(*struct.unpack("2d", content))


class _Part(NamedTuple):
    """An object of pybox2d, as a snapshot keeps it: a world or a part of one, or of its own."""

    kind: type
    state: _State | None
    place: tuple[Any, ...]
    attributes: dict[str, Any]


def _part(value: Any, memo: Memo) -> Any:
    state, place = memo.get("box2d", {}).get(_address(value), (None, ()))
    kind = type(value)
    if state is None and issubclass(kind, sys.modules["Box2D"].b2World):
        raise Unclonable("its b2World is no attribute of the environment, nor of one of its attributes")
    # What is in no world was destroyed: its copy stands for nothing, and cannot be used by mistake.
    part = memo[id(value)] = _Part(kind, state, place, {})
    part.attributes.update(_attributes(value, memo))
    return part


def _attributes(value: Any, memo: Memo) -> dict[str, Any]:
    return {name: copy_value(item, memo) for name, item in vars(value).items() if name not in ("this", "thisown")}


def _callback(value: Any, memo: Memo) -> Any:
    part = memo[id(value)] = _Part(type(value), None, ("callback",), {})
    part.attributes.update(_attributes(value, memo))
    return part


def _restored(part: _Part, memo: Memo) -> Any:
    """A replica's object for a part of a snapshot."""
    kind, state, place, attributes = part
    if place == ("callback",):
        result = memo[id(part)] = kind.__new__(kind)
        next(base for base in kind.__mro__ if base.__module__.startswith("Box2D")).__init__(result)
    elif state is None:
        result = memo[id(part)] = kind.__new__(kind)
    else:
        world = memo.get(id(state)) or _restored_world(state, memo)
        if id(part) in memo:  # by a world whose parts the user's objects refer to
            return memo[id(part)]
        proxy = world.proxy(place)
        result = memo[id(part)] = kind.__new__(kind) if place else proxy
        vars(result)["this"] = proxy.this
    vars(result).update({name: copy_value(item, memo) for name, item in attributes.items()})
    if state is not None and not place:
        _listen(result)
    return result


def _listen(world: Any) -> None:
    callbacks = dict(vars(world)["_b2World__data"])
    for key, name in (("contact", "contactListener"), ("contactfilter", "contactFilter"), ("destruction", "destructionListener")):
        if key in callbacks:
            setattr(world, name, callbacks[key])


def _restored_world(state: _State, memo: Memo) -> _World:
    worlds = memo["kept"].setdefault("box2d", {})
    world = memo[id(state)] = worlds.setdefault(state.number, None) or _World()
    worlds[state.number] = world
    world.restore(state.walk)
    for place, at in _data(world.mine):
        if at or place in state.data:
            world.proxy(place).userData = copy_value(state.data.get(place), memo)
    return world


def begin(env: Any, memo: Memo, known: dict[int, Any]) -> None:
    """Tells the copiers of this module what is where in an environment's worlds."""
    found = memo["box2d"] = {}
    worlds = worlds_of(env)
    states = [_State(number, _walk(world, known)) for number, world in enumerate(worlds)]
    for world, state in zip(worlds, states, strict=True):
        found[_address(world)] = (state, ())
        found |= {at: (state, place) for at, place in state.walk.places.items()}
    for state in states:
        state.data = {
            place: copy_value(ctypes.cast(at, ctypes.py_object).value, memo) for place, at in _data(state.walk) if at
        }


def _data(walk: _Walk) -> Iterator[tuple[tuple[Any, ...], int]]:
    """Addresses of the user's objects, by place."""
    for number, body in enumerate(walk.bodies):
        yield ("body", number), body.data[0]
        for i, at in enumerate(body.data[1:]):
            yield ("fixture", number, i), at
    for number, joint in enumerate(walk.joints):
        yield ("joint", number), joint.data[0]


def worlds_of(env: Any) -> list[Any]:
    box2d: Any = sys.modules.get("Box2D")
    if box2d is None:
        return []
    held = list(vars(env).values())
    held += [item for one in held if hasattr(one, "__dict__") and not isinstance(one, type) for item in vars(one).values()]
    return list({_address(one): one for one in held if isinstance(one, box2d.b2World)}.values())


def _value(value: Any, memo: Memo) -> Any:
    return value.copy()


def _definition(value: Any, memo: Memo) -> Any:
    return _Definition(value, memo)


class _Definition:
    def __init__(self, value: Any, memo: Memo):
        self.at = _address(value)
        self.shape = None if value.shape is None else _shape(_address(value.shape))[0]
        self.rest = value.friction, value.restitution, value.density, value.isSensor, value.categoryBits, value.maskBits, value.groupIndex
        self.data = copy_value(value.userData, memo)


def _restored_definition(value: _Definition, memo: Memo) -> Any:
    kept = memo["kept"].setdefault("definitions", {})
    box2d: Any = sys.modules["Box2D"]
    if value.at not in kept:
        kept[value.at] = box2d.b2FixtureDef()
    result = kept[value.at]
    if value.shape is not None:
        old = result.shape
        if old is None or _shape(_address(old))[0] != value.shape:
            result.shape = _make_shape(value.shape)
            if old is not None:
                old.thisown = True
    names = "friction restitution density isSensor categoryBits maskBits groupIndex".split()
    for name, item in zip(names, value.rest):
        setattr(result, name, item)
    result.userData = copy_value(value.data, memo)
    return result


def _refuse(value: Any, memo: Memo) -> Any:
    raise Unclonable(f"a {type(value).__name__} cannot be copied")


def register() -> None:
    box2d: Any = sys.modules["Box2D"]
    for kind in [one for one in vars(box2d).values() if isinstance(one, type) and one.__module__.startswith("Box2D")]:
        copiers = [
            ((box2d.b2World, box2d.b2Body, box2d.b2Fixture, box2d.b2Joint), _part),
            ((box2d.b2ContactListener, box2d.b2ContactFilter, box2d.b2DestructionListener, box2d.b2RayCastCallback, box2d.b2QueryCallback), _callback),
            ((box2d.b2Vec2, box2d.b2Vec3), _value),
            ((box2d.b2FixtureDef,), _definition),
            ((object,), _refuse),
        ]
        BASES[kind] = next(copier for kinds, copier in copiers if issubclass(kind, kinds))
    BASES[_Part] = _restored
    BASES[_Definition] = _restored_definition
