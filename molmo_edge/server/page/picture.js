// A photo from the user, ready to be sent: turned as its EXIF data says, and not larger than the model can use.

export const MAX_SIDE = 2048; // pixels: more than the crops of any Molmo hold
const MAX_BYTES = 3_000_000; // of a file that is sent as it is
const AS_IS = ["image/jpeg", "image/png", "image/webp"];

/**
 * Returns {url, data, width, height, sent: [width, height]}: an object URL to show, a data URI to send, the size in
 * pixels as it is displayed, and the size that is sent. Throws Error with a sentence.
 */
export async function readPicture(blob) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob, { imageOrientation: "from-image" });
  } catch {
    throw new Error("This browser cannot read the file as an image. Use a JPEG, PNG or WebP file.");
  }
  const { width, height } = bitmap;
  const scale = Math.min(1, MAX_SIDE / Math.max(width, height));
  const keep = scale === 1 && blob.size <= MAX_BYTES && AS_IS.includes(blob.type);
  const sent = [Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale))];
  const file = keep ? blob : await draw(bitmap, ...sent);
  bitmap.close();
  return { url: URL.createObjectURL(blob), data: await dataUri(file), width, height, sent };
}

function draw(source, width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff"; // behind transparent parts, which JPEG does not have
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  context.drawImage(source, 0, 0, width, height);
  return new Promise((resolve, reject) => {
    canvas.toBlob(
      (blob) => (blob ? resolve(blob) : reject(new Error("The photo is too large for this browser."))),
      "image/jpeg",
      0.92,
    );
  });
}

function dataUri(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("The file could not be read."));
    reader.readAsDataURL(blob);
  });
}

/** The first image among the files of a drop or a paste; null if there is none. */
export function imageIn(transfer) {
  return [...(transfer?.files ?? [])].find((file) => file.type.startsWith("image/")) ?? null;
}

/** Whether the page may show the picture of the camera: browsers allow it on this machine, and over HTTPS. */
export function hasCamera() {
  return Boolean(window.isSecureContext && navigator.mediaDevices?.getUserMedia);
}

/** Starts the camera in `video`; returns a function that stops it. */
export async function startCamera(video) {
  const stream = await navigator.mediaDevices.getUserMedia({
    video: { facingMode: "environment", width: { ideal: 1920 } },
    audio: false,
  });
  video.srcObject = stream;
  await video.play();
  return () => {
    for (const track of stream.getTracks()) track.stop();
    video.srcObject = null;
  };
}

/** The current picture of the camera. */
export function takePhoto(video) {
  return draw(video, video.videoWidth, video.videoHeight);
}
