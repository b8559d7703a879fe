"""Convert an RGB image to overlapping crops, padding masks and image tokens.

The model sees the image twice: as one global view, and as crops that overlap their neighbours, so that every object is
complete in some crop. After pooling, a cell in an overlap is kept by one crop only; the kept cells cover the image
exactly once.

Follows the reference's MultiModalPreprocessor, crop mode "overlap-and-resize-c2"
(olmo/data/model_preprocessor.py) including its quirks, with which the released weights were trained.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from molmo_edge.config import OVERVIEW_UNIT, ImageConfig
from molmo_edge.frontend.bilinear import resize_bilinear
from molmo_edge.frontend.image_files import MAX_PIXELS, ImageError, load_image
from molmo_edge.frontend.resize import resize
from molmo_edge.frontend.tokenizer import MOLMOE_SPECIAL_IDS, SpecialIds

__all__ = [
    "MAX_PIXELS",
    "ImageError",
    "ImageProcessor",
    "PreparedImage",
    "image_token_count",
    "load_image",
    "select_tiling",
]

DROPPED = -100  # token_index of a pooled cell that another crop keeps


@dataclass(frozen=True, eq=False)
class Overview:
    """The whole image for a convolutional tower, and the positions of the crops' patches in it."""

    pixels: np.ndarray  # float32 [3, h, w], normalised; sides are multiples of 32, padded with 0 below and to the right
    positions: np.ndarray  # float32 [n_crops, patches^2, 4, 2]: x and y of the centres of each patch's quarters, pixels


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """The input of the model for one image. Crop 0 is the global view."""

    crops: np.ndarray  # float32 [n_crops, patches^2, patch_size^2 * 3], normalised
    masks: np.ndarray  # float32 [n_crops, patches^2]: fraction of image pixels in a patch; row k belongs to crop k+1
    tokens: np.ndarray  # int32 [n]: without BOS
    token_index: np.ndarray  # int32 [n_crops, cells^2]: position in `tokens`, or DROPPED (-100)
    tiling: tuple[int, int]  # (rows, columns) of crops; (0, 0) for the global view only
    overview: Overview | None = None  # if the configuration has one
    # If `config.pools_across_crops`: int64 [n_cells, pool^2], the patches of each cell in row-major order, as indices
    # into the patches of all crops, -1 for none. token_index is int32 [n_cells] then: no cell is dropped.
    pooling: np.ndarray | None = None


@dataclass(frozen=True)
class ImageProcessor:
    """Converts images to crops and tokens. `special`: the special ids of the model's tokenizer; default: MolmoE's."""

    config: ImageConfig = field(default_factory=ImageConfig)
    special: SpecialIds = MOLMOE_SPECIAL_IDS

    def __call__(self, rgb: np.ndarray) -> PreparedImage:
        """Prepare `rgb`, uint8 [h, w, 3] (see `load_image`). Raises ImageError for anything else."""
        if (
            not isinstance(rgb, np.ndarray)
            or rgb.dtype != np.uint8
            or rgb.ndim != 3
            or rgb.shape[2] != 3
            or not rgb.size
        ):
            got = f"{rgb.dtype} {list(rgb.shape)}" if isinstance(rgb, np.ndarray) else type(rgb).__name__
            raise ImageError(f"the image must be uint8 [h, w, 3], not {got}; use load_image first")
        config = self.config
        tiling = select_tiling(rgb.shape[0], rgb.shape[1], config)
        rows, cols = tiling
        side = config.patches
        n_crops = 1 + rows * cols
        crops = np.empty((n_crops, side * side, config.patch_size**2 * 3), np.float32)
        # The reference appends the global view's row of -1 at the END, although its crop comes first. Row k therefore
        # has the mask of crop k+1, and the last crop counts as padded everywhere. The weights were trained with this.
        masks = np.full((n_crops, side * side), -1, np.float32)

        view, _ = fill_canvas(rgb, config.crop_size, config.crop_size, config)
        cut_crop(view, 0, 0, config, out=crops[0])
        if rows:
            height, width = (n * config.window * config.patch_size + _margin(config) for n in tiling)
            canvas, filled = fill_canvas(rgb, height, width, config)
            for k in range(rows * cols):
                y, x = (n * config.window for n in divmod(k, cols))  # in patches
                cut_crop(canvas, y, x, config, out=crops[1 + k])
                masks[k] = filled[y : y + side, x : x + side].reshape(-1)
        overview = _overview(rgb, tiling, config) if config.overview else None
        pooling = cell_patches(config, tiling) if config.pools_across_crops else None
        return PreparedImage(crops, masks, *self.layout(tiling), tiling, overview, pooling)

    def layout(self, tiling: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """`tokens` and `token_index` of a PreparedImage with this tiling."""
        return self._tokens(tiling), cell_tokens(self.config, tiling)

    def _tokens(self, tiling: tuple[int, int]) -> np.ndarray:
        s, blocks = self.special, []
        for number, (rows, cols) in enumerate(self.config.cell_grids(tiling)):
            start, patch = s.im_start, s.im_patch
            if number == 0 and self.config.layout != "molmo":
                start = _required(s.low_res_im_start, "<low_res_im_start>")
                patch = patch if self.config.layout == "molmo2" else _required(s.im_low, "<im_low>")
            row = [patch] * cols + [s.im_col] * _column_tokens(self.config, number)
            blocks.append(np.array([start, *row * rows, s.im_end], np.int32))
        return np.concatenate(blocks)


def _column_tokens(config: ImageConfig, block: int) -> int:
    """Tokens at the end of a row of cells: 1, but 0 in the global view (block 0) of Molmo2."""
    return int(block > 0 or config.layout == "molmo")


def _required(token: int | None, name: str) -> int:
    if token is None:
        raise ImageError(f"the model's images need the token {name}, which its tokenizer does not have")
    return token


def select_tiling(height: int, width: int, config: ImageConfig) -> tuple[int, int]:
    """Choose (rows, columns) of crops for an image of height x width pixels; (0, 0) if max_crops is 0.

    Chooses the tiling that enlarges the image least, or, if all of them shrink it, the one that shrinks it least; among
    equals the one with fewer crops, then with fewer rows. Reference: `select_tiling`.
    """
    if not config.max_crops:
        return 0, 0
    most = config.max_crops
    tilings = [(i, j) for i in range(1, most + 1) for j in range(1, most // i + 1)]
    tilings.sort(key=lambda t: (t[0] * t[1], t[0]))
    windows = np.array(tilings, np.float32) * np.float32(config.window * config.patch_size)  # [n, 2], pixels
    # Negative or 0 for a side shorter than the margins, as in the reference: such images get (1, 1).
    inner = np.array([height, width], np.float32) - np.float32(_margin(config))
    with np.errstate(divide="ignore"):
        scale = (windows / inner).min(axis=1)  # [n]
    fits = scale >= 1
    best = np.argmin(np.where(fits, scale, np.float32(10e9))) if fits.any() else np.argmax(scale)
    return tilings[int(best)]


def image_token_count(config: ImageConfig, tiling: tuple[int, int]) -> int:
    """Number of tokens of an image with this tiling, without BOS."""
    blocks = enumerate(config.cell_grids(tiling))
    return sum(rows * (cols + _column_tokens(config, number)) + 2 for number, (rows, cols) in blocks)


def kept_cells(cells: int, share: float) -> int:
    """How many of the `cells` of a view stay where only `share` of them, 0 to 1, does: at least one."""
    return max(1, round(share * cells))


def patch_grid(config: ImageConfig, tiling: tuple[int, int], height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of all patches in an image of height x width pixels, as fractions of its sides.

    Returns the centres (x, y), float32 [n_crops, patches^2, 2], and the size of a patch in each crop, float32
    [n_crops, 2]. Centres in the padding are below 0 or above 1.
    """
    rows, cols = tiling
    inside = (np.arange(config.patches) + 0.5) * config.patch_size
    views = [(config.crop_size, config.crop_size, 0, 0)]  # height and width of the canvas, y and x of the crop in it
    if rows:
        canvas = [n * config.window * config.patch_size + _margin(config) for n in tiling]
        stride = config.window * config.patch_size
        views += [(*canvas, i * stride, j * stride) for i, j in np.ndindex(rows, cols)]
    centres, sides = [], []
    for canvas_h, canvas_w, y, x in views:
        h, w = (canvas_h, canvas_w) if config.resize in ("dino", "siglip") else _fit(height, width, canvas_h, canvas_w)
        ys = (inside + y - (canvas_h - h) // 2) / h
        xs = (inside + x - (canvas_w - w) // 2) / w
        centres.append(np.stack(np.meshgrid(xs, ys), -1).reshape(-1, 2))
        sides.append((config.patch_size / w, config.patch_size / h))
    return np.stack(centres).astype(np.float32), np.array(sides, np.float32)


def _overview(rgb: np.ndarray, tiling: tuple[int, int], config: ImageConfig) -> Overview:
    height, width = rgb.shape[:2]
    h, w = _fit(height, width, config.overview, config.overview)
    pixels = np.zeros((3, *(-(-side // OVERVIEW_UNIT) * OVERVIEW_UNIT for side in (h, w))), np.float32)
    content = (resize(rgb, h, w) - np.array(config.mean, np.float32)) / np.array(config.std, np.float32)
    pixels[:, :h, :w] = content.transpose(2, 0, 1)
    centres, sides = patch_grid(config, tiling, height, width)
    quarters = np.array([(-1, -1), (1, -1), (-1, 1), (1, 1)], np.float32) / 4
    positions = centres[:, :, None] + quarters * sides[:, None, None]  # [n_crops, patches^2, 4, 2]
    return Overview(pixels, positions * np.array([w, h], np.float32))


def _margin(config: ImageConfig) -> int:
    """Pixels of a canvas side in addition to the windows."""
    return sum(config.overlap_margins) * config.patch_size


def cell_tokens(config: ImageConfig, tiling: tuple[int, int]) -> np.ndarray:
    """int32 [n_crops, cells^2]: position of each pooled cell of each crop in the tokens, or DROPPED."""
    if config.pools_across_crops:  # a block is im_start, then rows of cells that end in im_col, then im_end
        index, start = [], 1
        for number, (rows, cols) in enumerate(config.cell_grids(tiling)):
            width = cols + _column_tokens(config, number)
            index.append(start + np.arange(rows)[:, None] * width + np.arange(cols))
            start += rows * width + 2
        return np.concatenate([block.reshape(-1) for block in index]).astype(np.int32)
    n = config.cells
    left, right = (m // config.pool for m in config.overlap_margins)
    cell = np.arange(n)
    # A block is im_start, then rows of cells that each end with im_col, then im_end.
    index = [1 + cell[:, None] * (n + 1) + cell]
    rows, cols = tiling
    if rows:
        _, (_, width) = config.cell_grids(tiling)
        start = n * (n + 1) + 3  # after the global block and the next im_start
        for i, j in np.ndindex(rows, cols):
            y, x = (k * (config.window // config.pool) + cell for k in (i, j))  # [n]: row, column in the stitched grid
            keep_y, keep_x = (
                (cell >= (left if k else 0)) & (cell < n - (right if k < last else 0))
                for k, last in ((i, rows - 1), (j, cols - 1))
            )
            place = start + y[:, None] * (width + 1) + x
            index.append(np.where(keep_y[:, None] & keep_x, place, DROPPED))
    return np.stack(index).reshape(-1, n * n).astype(np.int32)


def cell_patches(config: ImageConfig, tiling: tuple[int, int]) -> np.ndarray:
    """`pooling` of a PreparedImage with this tiling."""
    grids = [np.arange(config.patches**2).reshape(config.patches, -1)]
    if tiling[0]:
        grids.append(stitched_patches(config, tiling))
    return np.concatenate([group_patches(grid, config.pool).reshape(-1, config.pool**2) for grid in grids])


def stitched_patches(config: ImageConfig, tiling: tuple[int, int]) -> np.ndarray:
    """The patches that tile the image, int64 [rows, cols], as indices into the patches of all crops.

    [0, 0] without crops beside the global view.
    """
    n, stride = config.patches, config.window
    patch = np.arange(n * n).reshape(n, n)
    left, right = config.overlap_margins
    stitched = np.empty(config.grids(tiling)[1] if tiling[0] else (0, 0), np.int64)
    for k, (i, j) in enumerate(np.ndindex(*tiling)):
        # Inner sides lose their margin to the neighbour, outer sides keep it.
        (y0, y1), (x0, x1) = (
            (left if at else 0, n - (right if at < last - 1 else 0)) for at, last in zip((i, j), tiling, strict=True)
        )
        y, x = i * stride, j * stride
        stitched[y + y0 : y + y1, x + x0 : x + x1] = (k + 1) * n * n + patch[y0:y1, x0:x1]
    return stitched


def pointing_grid(config: ImageConfig, tiling: tuple[int, int]) -> np.ndarray:
    """The patches that points are in, int64 [rows, cols]: `stitched_patches`, or the global view without crops."""
    return stitched_patches(config, tiling) if tiling[0] else np.arange(config.patches**2).reshape(config.patches, -1)


def image_in_grid(config: ImageConfig, tiling: tuple[int, int], height: int, width: int) -> tuple[float, ...]:
    """(left, top, width, height) of an image of height x width pixels in its `pointing_grid`, in patches."""
    rows, cols = config.grids(tiling)[-1]
    if config.resize in ("dino", "siglip"):
        return 0.0, 0.0, float(cols), float(rows)
    side = config.patch_size
    h, w = _fit(height, width, rows * side, cols * side)
    left, top = (cols * side - w) // 2, (rows * side - h) // 2
    return left / side, top / side, w / side, h / side


def pointable_cells(config: ImageConfig, tiling: tuple[int, int]) -> np.ndarray:
    """bool [n_cells]: the image tokens that a point can choose, those of `pointing_grid`.

    In MolmoPoint the tokens of the global view (`<im_low>`) can never be chosen.
    """
    counts = [rows * cols for rows, cols in config.cell_grids(tiling)]
    chosen = np.zeros(sum(counts), bool)
    if len(counts) > 1 or config.layout != "molmo_point":
        chosen[sum(counts[:-1]) :] = True
    return chosen


def group_patches(grid: np.ndarray, side: int) -> np.ndarray:
    """Group a grid of patches into cells of side x side: int [h, w] -> int64 [rows, cols, side^2], in row-major order.

    Incomplete cells, at the bottom and the right, have -1 for what is missing.
    """
    rows, cols = (-(-length // side) for length in grid.shape)
    padded = np.full((rows * side, cols * side), -1, np.int64)
    padded[: grid.shape[0], : grid.shape[1]] = grid
    return padded.reshape(rows, side, cols, side).transpose(0, 2, 1, 3).reshape(rows, cols, side * side)


def fill_canvas(rgb: np.ndarray, height: int, width: int, config: ImageConfig) -> tuple[np.ndarray, np.ndarray]:
    """Resize onto a canvas and normalise.

    Returns float32 [height, width, 3], and float32 [height / patch_size, width / patch_size], the fraction of image
    pixels in each patch.
    """
    patch = config.patch_size
    if config.resize == "dino":
        # Stretched to fill the canvas. The reference's filter rounds intermediate results to uint8; this one uses
        # floats, which differ by at most half a step.
        content = resize(rgb, height, width, cubic=True)
        top = left = 0
    elif config.resize == "siglip":
        content = resize_bilinear(rgb, height, width).astype(np.float32) / np.float32(255)
        top = left = 0
    else:
        h, w = _fit(rgb.shape[0], rgb.shape[1], height, width)
        content = resize(rgb, h, w)
        top, left = (height - h) // 2, (width - w) // 2
    h, w = content.shape[:2]
    mean, std = (np.tile(np.array(v, np.float32), width) for v in (config.mean, config.std))  # [width * 3]
    canvas = np.empty((height, width * 3), np.float32)
    canvas[:top], canvas[top + h :] = -mean / std, -mean / std  # padding is black before normalisation
    middle = canvas[top : top + h]
    middle[:, : left * 3], middle[:, (left + w) * 3 :] = 0, 0
    middle[:, left * 3 : (left + w) * 3] = content.reshape(h, w * 3)
    middle -= mean
    middle /= std
    inside_y = _per_patch(top, h, height, patch)
    inside_x = _per_patch(left, w, width, patch)
    return canvas.reshape(height, width, 3), np.outer(inside_y, inside_x).astype(np.float32) / np.float32(patch**2)


def _fit(h: int, w: int, height: int, width: int) -> tuple[int, int]:
    """The size of an h x w image scaled to fit height x width.

    Computed in float32 and truncated, as in the reference: one side in forty loses a pixel. The short side of a very
    long image would become 0, which fails in the reference; here it is at least 1.
    """
    size = np.array([h, w], np.float32)
    scale = (np.array([height, width], np.float32) / size).min()
    fit_h, fit_w = (max(int(side), 1) for side in size * scale)
    return fit_h, fit_w


def _per_patch(start: int, length: int, size: int, patch: int) -> np.ndarray:
    """Along one side of `size` pixels: the number of pixels of start..start+length in each patch."""
    edges = np.arange(0, size + 1, patch)
    inside = np.clip(edges - start, 0, length)
    return np.diff(inside)


def cut_crop(canvas: np.ndarray, y: int, x: int, config: ImageConfig, *, out: np.ndarray) -> None:
    """Copy the crop at patch (y, x) of `canvas` into `out`, float32 [patches^2, patch_size^2 * 3]."""
    p, n, size = config.patch_size, config.patches, config.crop_size
    crop = canvas[y * p : y * p + size, x * p : x * p + size]
    patches = crop.reshape(n, p, n, p * 3).transpose(0, 2, 1, 3)  # [n, n, p, p * 3]
    out.reshape(n, n, p, p * 3)[...] = patches
