// numpy's .npy, format 1.0 and 2.0 (https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html), of the few
// types that a routing has, in base64.

const MAGIC = [0x93, 0x4e, 0x55, 0x4d, 0x50, 0x59]; // \x93NUMPY
const SIZES = { "|u1": 1, "<u2": 2, "<u4": 4, "<f2": 2, "<f4": 4 };

/** {shape, data} of base64; data is a typed array, row by row. Error for what is no such array. */
export function decode(base64) {
  let bytes;
  try {
    bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  } catch {
    throw new Error("an array is not base64");
  }
  if (bytes.length < 10 || MAGIC.some((byte, i) => bytes[i] !== byte)) throw new Error("an array is not .npy");
  const view = new DataView(bytes.buffer);
  const [major, begin, length] = bytes[6] === 1 ? [1, 10, view.getUint16(8, true)] : [bytes[6], 12, view.getUint32(8, true)];
  if (major > 2) throw new Error(`.npy version ${major}: 1 or 2`);
  const header = new TextDecoder("latin1").decode(bytes.subarray(begin, begin + length));
  const type = /'descr':\s*'([^']+)'/.exec(header)?.[1];
  const shape = /'shape':\s*\(([\d,\s]*)\)/.exec(header)?.[1].split(",").filter((part) => part.trim()).map(Number);
  if (!(type in SIZES) || !shape) throw new Error(`.npy of ${type ?? "no type"}: ${Object.keys(SIZES).join(", ")}`);
  if (/'fortran_order':\s*True/.test(header)) throw new Error(".npy in Fortran's order");
  const count = shape.reduce((product, size) => product * size, 1);
  const at = begin + length;
  if (bytes.length - at !== count * SIZES[type]) throw new Error(".npy: its size is not its shape's");
  return { shape, data: read(type, view, at, count) };
}

function read(type, view, at, count) {
  const of = (Kind, get) => Kind.from({ length: count }, (_, i) => get(at + i * SIZES[type]));
  if (type === "|u1") return of(Uint8Array, (i) => view.getUint8(i));
  if (type === "<u2") return of(Uint16Array, (i) => view.getUint16(i, true));
  if (type === "<u4") return of(Uint32Array, (i) => view.getUint32(i, true));
  if (type === "<f4") return of(Float32Array, (i) => view.getFloat32(i, true));
  return of(Float32Array, (i) => half(view.getUint16(i, true)));
}

/** A 16-bit float's value. */
export function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

/** Base64 of a typed array in that shape: experts as <u2, all else as <f4. */
export function encode(data, shape) {
  const whole = data instanceof Uint16Array;
  const tuple = shape.length === 1 ? `${shape[0]},` : shape.join(", ");
  let header = `{'descr': '${whole ? "<u2" : "<f4"}', 'fortran_order': False, 'shape': (${tuple}), }`;
  header = header.padEnd(Math.ceil((10 + header.length + 1) / 64) * 64 - 11) + "\n";
  const size = whole ? 2 : 4;
  const bytes = new Uint8Array(10 + header.length + data.length * size);
  const view = new DataView(bytes.buffer);
  bytes.set([...MAGIC, 1, 0]);
  view.setUint16(8, header.length, true);
  bytes.set(new TextEncoder().encode(header), 10);
  data.forEach((value, i) => {
    const at = 10 + header.length + i * size;
    if (whole) view.setUint16(at, value, true);
    else view.setFloat32(at, value, true);
  });
  let letters = "";
  for (let i = 0; i < bytes.length; i += 0x8000) letters += String.fromCharCode(...bytes.subarray(i, i + 0x8000));
  return btoa(letters);
}
