// npm install zeromq && node examples/subscriber.mjs tcp://127.0.0.1:5599
import { Subscriber } from "zeromq";

const socket = new Subscriber();
socket.connect(process.argv[2] ?? "tcp://127.0.0.1:5599");
socket.subscribe("prediction");
for await (const [topic, json] of socket) {
  const { label, confidence } = JSON.parse(json);
  console.log(label, confidence);
}
