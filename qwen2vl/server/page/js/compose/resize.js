/**
 * The size and the tokens that a picture will have in the model (smart_resize).
 *
 * The same arithmetic as qwen2vl/processor/image.py: sides are multiples of `factor`, the area is
 * within the limits, the aspect ratio is kept as closely as that allows.
 */

const MAX_RATIO = 200;

/** @typedef {{factor: number, minPixels: number, maxPixels: number}} PixelLimits */

/**
 * Rounds halves to the even neighbor, as Python does.
 * @param {number} value
 */
function roundHalfToEven(value) {
  const below = Math.floor(value);
  if (value - below !== 0.5) return Math.round(value);
  return below % 2 === 0 ? below : below + 1;
}

/**
 * Returns the limits of a request that gives max_pixels; null gives none.
 * @param {PixelLimits} limits  of the model
 * @param {number | null} maxPixels
 * @returns {PixelLimits}
 */
export function withMaxPixels(limits, maxPixels) {
  if (maxPixels === null) return limits;
  return { ...limits, maxPixels, minPixels: Math.max(1, Math.min(limits.minPixels, maxPixels)) };
}

/**
 * Returns the resized size, or null for a picture that is too narrow.
 * @param {number} width
 * @param {number} height
 * @param {PixelLimits} limits
 * @returns {{width: number, height: number} | null}
 */
export function resizedSize(width, height, { factor, minPixels, maxPixels }) {
  const [short, long] = width < height ? [width, height] : [height, width];
  if (short < 1 || long / short > MAX_RATIO) return null;
  let rows = roundHalfToEven(height / factor) * factor;
  let columns = roundHalfToEven(width / factor) * factor;
  if (rows * columns > maxPixels) {
    const shrink = Math.sqrt((height * width) / maxPixels);
    rows = Math.max(factor, Math.floor(height / shrink / factor) * factor);
    columns = Math.max(factor, Math.floor(width / shrink / factor) * factor);
  } else if (rows * columns < minPixels) {
    const grow = Math.sqrt(minPixels / (height * width));
    rows = Math.ceil((height * grow) / factor) * factor;
    columns = Math.ceil((width * grow) / factor) * factor;
  }
  return { width: columns, height: rows };
}

/**
 * Returns the tokens of a resized picture: one for each square of `factor` pixels.
 * @param {{width: number, height: number}} size
 * @param {number} factor
 */
export function tokensOf(size, factor) {
  return (size.width / factor) * (size.height / factor);
}
