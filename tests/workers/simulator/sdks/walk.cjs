// Calls one SDK: reads {package, client, options, calls} from standard input, and writes one result per call.

// Names are compared without case and underscores, because the SDKs of the two languages differ in both.
const plain = (name) => name.replaceAll("_", "").toLowerCase();

function membersOf(object) {
  const names = new Set();
  for (let one = object; one && one !== Object.prototype; one = Object.getPrototypeOf(one)) {
    Object.getOwnPropertyNames(one).forEach((name) => names.add(name));
  }
  return [...names];
}

const named = (object, name) => membersOf(object).find((one) => plain(one) === plain(name));

async function main() {
  const { package: name, client: kind, options, calls } = JSON.parse(require("fs").readFileSync(0, "utf8"));
  const client = new (require(name)[kind])(options);
  const results = [];
  for (const [group, method, args] of calls) {
    try {
      const part = client[named(client, group)];
      const value = await part[named(part, method)](...args);
      results.push({ value: value ?? null });
    } catch (error) {
      results.push({ error: `${error.name}: ${error.message}`, status: error.statusCode ?? null });
    }
  }
  console.log(JSON.stringify(results));
}

main();
