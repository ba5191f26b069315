"""Names for jobs that got none: the function's name and two words, as in `area-calm-otter`.

Words, and not a time or digits: people say them, remember them until the next notebook, and tell them apart at a
glance; when a job was made stands beside it in queue.jobs(). Some 10,000 pairs; whoever finds one taken takes the next.
"""

from __future__ import annotations

from typing import Final

_ADJECTIVES: Final = (
    "able amber ample azure bold brave brief bright brisk calm candid clear clever cool coral cosy crisp curious "
    "daring deft dry eager early easy even fair fast fine firm fleet fond frank free fresh gentle glad golden good "
    "grand green handy happy hardy honest humble ideal jade jolly keen kind large late lively loyal lucid lucky "
    "mellow merry mild modest neat new nimble noble open patient plain polite proud pure quick quiet rapid ready "
    "rosy round royal sage sharp shy silent silver simple sleek smart smooth snug soft solid spry steady still "
    "sunny sure swift tame tidy tiny true vivid warm wary wide wise witty young "
)
_NOUNS: Final = (
    "acorn alder aspen badger bear beaver beech bison birch brook canyon cedar cliff cloud comet coral crane creek "
    "crow deer delta dove dune eagle elk elm falcon fern finch fir fjord fox frog garnet glade goose grove gull "
    "hare harbour hawk hazel heron hill ibis iris island ivy jay juniper kestrel kite lake lark laurel lemur lily "
    "lime lion lotus lynx magpie maple marsh martin meadow mole moon moose moss moth newt oak oasis olive orca "
    "oriole osprey otter owl panda pebble pine plover pond poplar puffin quail quartz rain raven reef ridge river "
    "robin rook rowan seal shore snow sparrow spruce star stoat stone stork swan teal tern thrush tiger trout tulip "
    "valley violet vole walnut willow wolf wren yew "
)


def made_up(function: str, job: str, times: int = 0) -> str:
    """Return a name for a job by its id; another one for each time that the one before was taken."""
    adjectives, nouns = _ADJECTIVES.split(), _NOUNS.split()
    words = int(job[-10:], 16) + times
    noun, adjective = words % len(nouns), words // len(nouns) % len(adjectives)
    return f"{function}-{adjectives[adjective]}-{nouns[noun]}"
