// Server-sent events of a fetch response, as they arrive.

/** Feed chunks of text into the returned function; it calls `onEvent` with the data of each event. */
export function eventParser(onEvent) {
  let rest = "";
  return (text) => {
    rest += text;
    const events = rest.split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event
        .split("\n")
        .filter((line) => line.startsWith("data:"))
        .map((line) => line.slice(5).replace(/^ /, ""));
      if (data.length) onEvent(data.join("\n"));
    }
  };
}
