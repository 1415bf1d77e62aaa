"""What is in a world of Box2D, read where Box2D keeps it in memory.

pybox2d shows positions and velocities, but not what else decides a step: which contacts touched, the impulses that the
solver starts from, for how long a body has rested. Offsets are those of Box2D 2.3 on a machine with 64 bits, in bytes;
:func:`verify` finds out in a world of its own whether they hold for the library that is installed.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from sb3_bridge.clones.copying import Unclonable

Place = tuple[Any, ...]
"""What stands where in a world: ``("body", number)``, ``("fixture", body, number)``, ``("joint", number)``, ``()`` itself."""
CHAIN = 3  # a type of shape: it owns its vertices, the others are all in one piece
MOTION, MASS = slice(0, 88), slice(144, 176)  # of a body: type to torque, mass to sleep time
PARTS = (
    slice(0, 4),
    slice(32, 40),
    slice(52, 59),
)  # of a fixture: density; friction, restitution; filter, sensor
JOINT = 128  # where that begins which joints of one type have alone
FLAGS, MANIFOLD = slice(8, 12), slice(120, 204)  # of a contact; manifold to tangent speed
NODE, HEADER = (
    40,
    (slice(0, 4), slice(16, 20), slice(24, 40)),
)  # of the tree: the contact manager begins with it
FILTER, DESTRUCTION = (
    slice(104, 120),
    slice(168, 176),
)  # callbacks: filter and listener of contacts; of destruction
COLLIDE = slice(117, 118)  # of a joint: whether its bodies do
SETTINGS = (slice(-8, -4), slice(152, 161), slice(184, 192))  # of a world, from its contact manager on


read = ctypes.string_at
"""``read(at, size)``: the bytes at an address."""


class Body(NamedTuple):
    """A body; equal ``made`` are equal but for motion and mass."""

    at: int  # its address
    made: Any  # type, whether it is active, fixtures
    motion: bytes
    mass: bytes
    fixtures: list[int]  # their addresses
    proxies: list[int]  # addresses of what the broad phase knows of them, one for each part of a shape
    leaves: list[bytes]  # what is there: a box, and the number of a leaf of the tree
    data: list[int]  # addresses of the user's objects: the body's, its fixtures'


class Joint(NamedTuple):
    """A joint; ``made`` is its type, the numbers of its bodies, and whether they collide."""

    at: int
    made: Any
    state: bytes
    data: int


class Contact(NamedTuple):
    """A contact, ``between`` two times (place of a fixture, part of its shape)."""

    between: tuple[Any, ...]
    flags: bytes
    manifold: bytes


class Tree(NamedTuple):
    """The broad phase's tree of boxes: where two of them meet, there is a contact."""

    header: list[bytes]  # its root, how many nodes it has, the first one that is free, and what balances it
    nodes: bytes
    moved: bytes  # leaves for which new contacts are still to be looked for


class World(NamedTuple):
    """All that a world holds, oldest first; ``places`` are those of addresses."""

    settings: list[bytes]
    bodies: list[Body]
    joints: list[Joint]
    contacts: list[Contact]
    tree: Tree
    places: dict[int, Place]

    def data(self) -> Iterator[tuple[Place, int]]:
        """Addresses of all objects of the user's that a world holds, 0 for none."""
        for number, body in enumerate(self.bodies):
            yield ("body", number), body.data[0]
            yield from ((("fixture", number, i), at) for i, at in enumerate(body.data[1:]))
        yield from ((("joint", number), joint.data) for number, joint in enumerate(self.joints))


def write(at: int, content: bytes) -> None:
    """Writes to an address."""
    ctypes.memmove(at, content, len(content))


def address(proxy: Any) -> int:
    """Of what an object of pybox2d stands for."""
    return int(proxy.this)


def pointer(at: int) -> int:
    """The address that is kept at an address."""
    return ctypes.c_uint64.from_address(at).value


def integer(at: int) -> int:
    """The int that is kept at an address."""
    return ctypes.c_int32.from_address(at).value


def _chain(at: int, size: int, following: int) -> list[tuple[int, bytes]]:
    """The objects of a linked list, of which Box2D puts the newest at the head."""
    found = []
    while at:
        found.append((at, read(at, size)))
        (at,) = struct.unpack_from("Q", found[-1][1], following)
    return found[::-1]


def read_shape(at: int) -> tuple[Any, list[tuple[int, bytes]]]:
    """What a shape was made with, and the memory that holds it."""
    (kind,) = struct.unpack("i", read(at + 8, 4))
    sizes = (24, 50, 28 + 16 * sys.modules["Box2D"].b2_maxPolygonVertices, 46)
    if not 0 <= kind < len(sizes):
        raise Unclonable(f"a shape of an unknown type ({kind}) cannot be copied")
    content = read(at + 12, sizes[kind] - 12)
    if kind != CHAIN:
        return (kind, content), [(at + 12, content)]
    vertices, n_vertices = struct.unpack_from("QI", content, 4)
    held = read(vertices, 8 * n_vertices)
    return (kind, content[16:], held), [(at + 12, content), (vertices, held)]


def make_shape(made: Any) -> Any:
    """A shape of pybox2d."""
    box2d: Any = sys.modules["Box2D"]
    kinds = (box2d.b2CircleShape, box2d.b2EdgeShape, box2d.b2PolygonShape, box2d.b2ChainShape)
    shape = kinds[made[0]]()
    if made[0] == CHAIN:
        shape.vertices_chain = list(struct.iter_unpack("2f", made[2]))
    write(address(shape) + (28 if made[0] == CHAIN else 12), made[1])
    return shape


JOINTS = dict(
    enumerate(
        [
            "Revolute",
            "Prismatic",
            "Distance",
            "Pulley",
            "Mouse",
            "Gear",
            "Wheel",
            "Weld",
            "Friction",
            "Rope",
            "Motor",
        ],
        1,
    )
)


_SIZES: dict[int, int] = {}


def _joint_size(kind: int) -> int:
    """Bytes of Box2D's block for a joint: the distance of two that are made one after the other."""
    if kind in _SIZES:
        return _SIZES[kind]
    box2d: Any = sys.modules["Box2D"]
    name = f"b2{JOINTS.get(kind, 'Unknown')}Joint"
    if kind not in JOINTS or name == "b2GearJoint":  # it refers to other joints, and to their bodies
        raise Unclonable(f"a {name} cannot be made anew in a copy of its world")
    world = box2d.b2World()
    ends = {"bodyA": world.CreateDynamicBody(), "bodyB": world.CreateDynamicBody()}
    joints = [world.CreateJoint(getattr(box2d, f"{name}Def")(**ends)) for _ in range(2)]
    _SIZES[kind] = abs(address(joints[1]) - address(joints[0]))
    return _SIZES[kind]


def read_world(world: Any, known: dict[int, Any]) -> World:
    """All of a world; ``known`` keeps bodies by address, to use them again where nothing in them changed."""
    manager = address(world.contactManager)
    places: dict[int, Place] = {}
    bodies, joints, contacts = [], [], []
    for number, (at, raw) in enumerate(_chain(pointer(manager + 128), 184, 104)):
        key, motion, mass = (raw[112:124], raw[4] & 32, raw[176:]), raw[MOTION], raw[MASS]
        before, memory, body = known.get(at, (None, (), None))
        # What is held by something comes later in ``memory`` than what holds it: an address in it is good when it is read.
        if key != before or any(read(part, len(content)) != content for part, content in memory):
            body, memory = _read_body(at, raw)
        elif (leaves := [read(part, 32) for part in body.proxies]) != body.leaves or body.motion != motion:
            body = body._replace(motion=motion, mass=mass, leaves=leaves)
        elif body.mass != mass:
            body = body._replace(mass=mass)
        known[at] = key, memory, body
        bodies.append(body)
        places[at] = ("body", number)
        for i, fixture in enumerate(body.fixtures):
            places[fixture] = ("fixture", number, i)
    for number, (at, raw) in enumerate(_chain(pointer(manager + 136), JOINT, 24)):
        places[at] = ("joint", number)
        made = (raw[8], *(places[body][1] for body in struct.unpack_from("2Q", raw, 96)), raw[COLLIDE])
        joints.append(Joint(at, made, read(at + JOINT, _joint_size(raw[8]) - JOINT), pointer(at + 120)))
    for _, raw in _chain(pointer(manager + 88), MANIFOLD.stop, 24):
        one, two, child, other = struct.unpack_from("QQii", raw, 96)
        contacts.append(Contact((places[one], child, places[two], other), raw[FLAGS], raw[MANIFOLD]))
    moved = read(pointer(manager + 48), 4 * integer(manager + 60))
    nodes = read(pointer(manager + 8), NODE * integer(manager + 20))
    header = [read(manager + part.start, part.stop - part.start) for part in HEADER]
    settings = [read(manager + part.start, part.stop - part.start) for part in SETTINGS]
    return World(settings, bodies, joints, contacts, Tree(header, nodes, moved), places)


def _read_body(at: int, raw: bytes) -> tuple[Body, list[tuple[int, bytes]]]:
    fixtures = _chain(pointer(at + 112), 72, 8)
    shapes = [read_shape(pointer(fixture + 24)) for fixture, _ in fixtures]
    made = [
        (*(one[part] for part in PARTS), shape) for (_, one), (shape, _) in zip(fixtures, shapes, strict=True)
    ]
    proxies = [(pointer(fixture + 40), 32 * integer(fixture + 48)) for fixture, _ in fixtures]
    parts = [first + i for first, size in proxies for i in range(0, size, 32)]
    leaves = [read(part, 32) for part in parts]
    data = [pointer(at + 176), *(pointer(fixture + 64) for fixture, _ in fixtures)]
    places = [fixture for fixture, _ in fixtures]
    body = Body(at, (raw[0], raw[4] & 32, made), raw[MOTION], raw[MASS], places, parts, leaves, data)
    return body, [*fixtures, *(part for _, memory in shapes for part in memory)]


def as_proxy(fixture: int, child: int) -> complex:
    """What ``AddPair`` reads as a proxy of the broad phase: pybox2d hands it the address of a Python object."""
    return complex(*struct.unpack("2d", struct.pack("Qii", fixture, child, 0)))


_VERIFIED: list[str] = []


def verify() -> None:
    """Compares what is read in memory with what pybox2d says, in a world of its own.

    Raises:
      Unclonable: this build of Box2D keeps its worlds in another way.
    """
    box2d: Any = sys.modules["Box2D"]
    if box2d.__version__ in _VERIFIED:
        return
    world = box2d.b2World(gravity=(0.5, -3.0))
    box, chain = box2d.b2PolygonShape(box=(4, 1)), box2d.b2ChainShape(vertices_chain=[(5, 0), (6, 1), (7, 0)])
    ground = world.CreateStaticBody(shapes=[box, chain, box2d.b2EdgeShape(vertices=[(8, 0), (9, 1)])])
    definition = box2d.b2FixtureDef(shape=box2d.b2CircleShape(radius=0.5), density=2, restitution=0.25)
    ball = world.CreateDynamicBody(
        position=(0, 1.45), fixtures=definition, linearDamping=0.375, angularDamping=0.625
    )
    arm = world.CreateDynamicBody(position=(0, 3))
    resting = world.CreateDynamicBody(position=(20, 0), gravityScale=0)
    motor = {"enableMotor": True, "maxMotorTorque": 9, "motorSpeed": 1.75}
    joint = world.CreateRevoluteJoint(bodyA=ball, bodyB=arm, anchor=(0, 2.5), **motor)
    ball.userData = marker = object()
    for _ in range(3):
        world.Step(1 / 64, 4, 4)
    (contact,) = world.contacts
    contact.enabled = False
    manager, fixture = address(world.contactManager), ball.fixtures[0]
    world.contactFilter, world.contactListener = box2d.b2ContactFilter(), box2d.b2ContactListener()
    world.destructionListener = type("Unnoticed", (box2d.b2DestructionListener,), {})()
    links = {manager + 88: contact, manager + 128: resting, manager + 136: joint, address(ball) + 88: world}
    links |= {address(resting) + 104: arm, address(ball) + 112: fixture, address(fixture) + 24: fixture.shape}
    callbacks = (world.contactFilter, world.contactListener, world.destructionListener)
    links |= dict(zip((manager + FILTER.start, manager + FILTER.start + 8), callbacks[:2], strict=True))
    links[manager + DESTRUCTION.start] = callbacks[2]
    is_known = struct.calcsize("P") == 8 and all(pointer(at) == address(one) for at, one in links.items())
    if is_known:  # else there is nothing to follow
        found = read_world(world, {})
        _, body, _, other = found.bodies
        state, manifold, point = found.joints[0].state, found.contacts[0].manifold, contact.manifold.points[0]
        leaf = integer(body.proxies[0] + 28)
        fat, pair = world.contactManager.broadPhase.GetFatAABB(leaf), as_proxy(address(fixture), 3)
        shapes = [make_shape(made[-1]).vertices for made in found.bodies[0].made[2]]
        is_known = (
            struct.unpack("12x2f36xf4x3f12x", body.motion)
            == (*ball.position, ball.angle, *ball.linearVelocity, ball.angularVelocity)
            and struct.unpack("f12x3f4x", body.mass) == (ball.mass, 0.375, 0.625, 1.0)
            and struct.unpack("24x2f", other.mass) == (0.0, 3 / 64)  # how long it has rested
            and (body.data, found.contacts[0].between)
            == ([id(marker), 0], (("fixture", 0, 0), 0, ("fixture", 1, 0), 0))
            and struct.unpack_from("2f", manifold, 8) == (point.normalImpulse, point.tangentImpulse)
            and struct.unpack_from("2f", manifold, 72) == (contact.friction, contact.restitution)
            and (found.contacts[0].flags[0] & 6, body.made[2][0][1])
            == (2, struct.pack("2f", fixture.friction, 0.25))
            and all(
                struct.pack("f", part) in state
                for part in (*joint.GetReactionForce(1.0), joint.GetMotorTorque(1.0), joint.motorSpeed)
            )
            and struct.unpack("2fx", found.settings[1]) + struct.unpack("f4x", found.settings[2])
            == (0.5, -3.0, 64.0)
            and struct.unpack_from("4f", found.tree.nodes, NODE * leaf) == (*fat.lowerBound, *fat.upperBound)
            and pointer(pointer(manager + 8) + NODE * leaf + 16) == body.proxies[0]
            and integer(manager + 16) == 2 * world.proxyCount - 1
            and shapes == [one.shape.vertices for one in ground.fixtures]
            and read(id(pair) + 16, 16) == struct.pack("Qii", address(fixture), 3, 0)
        )
    if not is_known:
        raise Unclonable(
            f"Box2D {box2d.__version__} keeps its worlds in memory in a way that is not known here"
        )
    _VERIFIED.append(box2d.__version__)
