"""Questions about scenes of shapes and icons, of the task family `objects`.

`scene.py` has the scene as the samplers see it, and the choice among their questions; each of the
other modules samples questions of one sort: `identity` (names, colors, presence), `counting`,
`places`, `comparisons`, `boxes` (grounding), and `lists` (one question with several answers). A
sampler returns None where its question has no unambiguous answer in the scene.
"""

from __future__ import annotations
