"""The policy types of LeRobot that are no family here, and why: a line that `fit`, `bench` and `compress` show."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    """Why a policy type is not supported.

    Attributes:
        reason: The end of the sentence "policy type 'x' is not supported: ...".
        releases: The LeRobot releases that have the type, as a version specifier; empty for every supported one.
    """

    reason: str
    releases: str = ""


_KEYPOINTS = (
    "a spatial softmax makes keypoints of its feature map at once, and no layer behind it gets a grid of visual "
    "tokens; the paper's tree trains a new layer on K tokens in its place, which no dense policy has"
)
REFUSED: dict[str, Refusal] = {
    "diffusion": Refusal(_KEYPOINTS),
    "vqbet": Refusal(_KEYPOINTS),
    "tdmpc": Refusal(
        "its convolutions end in one vector per image, by a layer as wide as the whole map; the paper's tree trains "
        "another for K tokens in its place, which no dense policy has"
    ),
    "gaussian_actor": Refusal("it pools each image into one vector, and no layer gets a grid of visual tokens"),
    "multi_task_dit": Refusal("its transformer gets one token per camera, the class token of CLIP"),
    "fastwam": Refusal("its visual tokens are a video that it is trained to predict, and it needs each of them"),
    "lingbot_va": Refusal("its visual tokens are a video that it denoises in fixed slots, and it needs each of them"),
}
