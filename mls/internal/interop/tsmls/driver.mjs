// Drives clients of ts-mls for the test in this folder: one JSON object a line in, one out, byte strings in base64.
// A client keeps its KeyPackage, its state in a group, and the state that its staged commit leads to.
import { createInterface } from "node:readline"
import * as mls from "ts-mls"
import { p256, p384, p521 } from "@noble/curves/nist.js"
import { XWing } from "@hpke/hybridkem-x-wing"
import { ml_dsa44, ml_dsa65 } from "@noble/post-quantum/ml-dsa.js"
import { shake256 } from "@noble/hashes/sha3.js"
import { decodeProposal } from "ts-mls/proposal.js"
import { decodeGroupContext, encodeGroupContext } from "ts-mls/groupContext.js"
import { signGroupInfo } from "ts-mls/groupInfo.js"
import { encodeLeafNodeTBS } from "ts-mls/leafNode.js"
import { signWithLabel } from "ts-mls/crypto/signature.js"
import { updateLeafKey } from "ts-mls/privateKeyPath.js"
import { decodeRatchetTree, encodeRatchetTree } from "ts-mls/ratchetTree.js"
import { encode } from "ts-mls/codec/tlsEncoder.js"
import { decodeVarLenData, decodeVarLenType, varLenDataEncoder } from "ts-mls/codec/variableLength.js"

// The suites of draft-ietf-mls-pq-ciphersuites that the primitives of ts-mls make up, with the smaller ML-DSA of the
// library that it has the large one from, by our numbers. Its own post-quantum suites have other hashes, and 79 has
// another KDF in HPKE than outside.
const composed = [
  [0xf001, "X-Wing", "SHA-256", "AES128GCM", "Ed25519"],
  [0xf002, "X-Wing", "SHA-384", "AES256GCM", "Ed25519"],
  [0xf006, "ML-KEM-768", "SHA-384", "AES256GCM", "Ed25519"],
  [0xf007, "ML-KEM-768", "SHA-384", "AES256GCM", "P256"],
  [0xf008, "ML-KEM-1024", "SHA-384", "AES256GCM", "P384"],
  [0xf009, "X-Wing", "SHA-384", "CHACHA20POLY1305", "ML-DSA-44"],
  [0xf00a, "ML-KEM-768", "SHA-384", "AES256GCM", "ML-DSA-65"],
  [0xf00b, "ML-KEM-1024", "SHA-384", "AES256GCM", "ML-DSA-87"],
].map(([id, kem, hash, aead, signature]) => {
  const name = [kem, aead, hash, signature].join("_")
  mls.ciphersuites[name] = id
  return { name, hash, hpke: { kem, kdf: "HKDF-" + hash.replace("-", ""), aead }, signature }
})

// implement returns a suite. The seeds of post-quantum keys are derived here as draft-ietf-hpke-pq, Sections 3 and 4,
// has it; in ts-mls DeriveKeyPair of ML-KEM takes the seed itself, and that of X-Wing derives it otherwise.
async function implement(suite) {
  const dsa = { "ML-DSA-44": ml_dsa44, "ML-DSA-65": ml_dsa65 }[suite.signature]
  const impl = await mls.getCiphersuiteImpl(dsa ? { ...suite, signature: "ML-DSA-87" } : suite)
  if (dsa)
    impl.signature = {
      sign: async (key, m) => dsa.sign(m, key),
      verify: async (key, m, signature) => dsa.verify(signature, m, key),
      keygen: async () => {
        const { publicKey, secretKey } = dsa.keygen()
        return { publicKey, signKey: secretKey }
      },
    }
  const kem = { "X-Wing": [0x647a, 32], "ML-KEM-768": [0x41, 64], "ML-KEM-1024": [0x42, 64] }[suite.hpke.kem]
  if (!kem) return impl
  const [id, size] = kem
  const u16 = (n) => Uint8Array.of(n >> 8, n & 255)
  const deriveKeyPair = (ikm) => {
    const label = [Buffer.from("HPKE-v1KEM"), u16(id), u16(13), Buffer.from("DeriveKeyPair"), u16(size)]
    const seed = shake256(Buffer.concat([ikm, ...label]), { dkLen: size })
    return id === 0x647a ? new XWing().generateKeyPairDerand(seed) : impl.hpke.deriveKeyPair(seed)
  }
  return { ...impl, hpke: { ...impl.hpke, deriveKeyPair } }
}

const clients = new Map()
const bytes = (s) => new Uint8Array(Buffer.from(s ?? "", "base64"))
const base64 = (b) => b && Buffer.from(b).toString("base64")

function decode(decoder, b) {
  const [value, n] = decoder(b, 0) ?? []
  if (n !== b.length) throw new Error("does not decode")
  return value
}

const message = (wireformat, field, value) =>
  base64(mls.encodeMlsMessage({ version: "mls10", wireformat, [field]: value }))
const welcome = (value) => value && message("mls_welcome", "welcome", value)
const groupInfo = (value) => message("mls_group_info", "groupInfo", value)
const received = (s) => decode(mls.decodeMlsMessage, bytes(s))
const tree = (s) => (s ? decode(decodeRatchetTree, bytes(s)) : undefined)
const extensions = (list) => (list ?? []).map((e) => ({ extensionType: named(e.Type), extensionData: bytes(e.Data) }))
const proposals = (list) => (list ?? []).map((p) => decode(decodeProposal, bytes(p)))

function named(type) {
  const known = Object.entries(mls.defaultExtensionTypes).find(([, v]) => v === type)
  return known ? known[0] : type
}

function psks(list) {
  return Object.fromEntries((list ?? []).map((p) => [mls.bytesToBase64(bytes(p.ID)), bytes(p.Secret)]))
}

// senderByItself returns the external_senders extension as ts-mls wants it: a sender in each. RFC 9420,
// Section 12.1.8.1, has a list of them in one, so that groups with external senders can't have members of both; but the
// extensions aren't in what an external sender signs (Section 6.1).
function senderByItself(e) {
  if (e.extensionType !== "external_senders") return [e]
  const senders = decode(decodeVarLenType(mls.decodeExternalSender), e.extensionData)
  return senders.map((s) => ({ ...e, extensionData: mls.encodeExternalSender(s) }))
}

// signatureKey makes a key pair. ts-mls gives ECDSA keys as compressed points; RFC 9420, Section 5.1.1, has uncompressed
// ones, which it takes.
async function signatureKey(suite, algorithm) {
  const keys = await suite.signature.keygen()
  const curve = { P256: p256, P384: p384, P521: p521 }[algorithm]
  if (curve) keys.publicKey = curve.Point.fromBytes(keys.publicKey).toBytes(false)
  return keys
}

// describe makes a GroupInfo for external joiners. ts-mls writes the bare key into the external_pub extension; in
// RFC 9420, Section 12.4.3.2, it is a vector and so has its length before it.
async function describe(c, state, withTree) {
  const make = withTree ? mls.createGroupInfoWithExternalPubAndRatchetTree : mls.createGroupInfoWithExternalPub
  const { signature, ...info } = await make(state, [], c.suite)
  for (const e of info.extensions)
    if (e.extensionType === "external_pub") e.extensionData = encode(varLenDataEncoder)(e.extensionData)
  return groupInfo(await signGroupInfo(info, state.signaturePrivateKey, c.suite.signature))
}

// readsExternalPub returns the suite for a joinGroupExternal, which takes the extension's data for the bare key too.
function readsExternalPub(suite, info) {
  const data = info.extensions.find((e) => e.extensionType === "external_pub")?.extensionData
  const importPublicKey = (k) =>
    suite.hpke.importPublicKey(data && Buffer.compare(k, data) === 0 ? decode(decodeVarLenData, k) : k)
  return { ...suite, hpke: { ...suite.hpke, importPublicKey } }
}

// pathsWith returns the suite for a commit after which the GroupContext has the extensions that renewed() says, if any.
// ts-mls encrypts path secrets in the context of the old ones; it is that of the new (RFC 9420, Section 12.4.1).
function pathsWith(suite, renewed) {
  const opaque = encode(varLenDataEncoder)
  const inNew = (info) => {
    const [label, n] = decodeVarLenData(info, 0)
    if (!renewed() || !Buffer.from(label).equals(Buffer.from("MLS 1.0 UpdatePathNode"))) return info
    const context = decode(decodeGroupContext, decode(decodeVarLenData, info.slice(n)))
    return Buffer.concat([info.slice(0, n), opaque(encodeGroupContext({ ...context, extensions: renewed() }))])
  }
  const hpke = {
    ...suite.hpke,
    seal: (key, plaintext, info, aad) => suite.hpke.seal(key, plaintext, inNew(info), aad),
    open: (key, kemOutput, ciphertext, info, aad) => suite.hpke.open(key, kemOutput, ciphertext, inNew(info), aad),
  }
  return { ...suite, hpke }
}

const renewal = (list) =>
  list.find((p) => p.proposalType === "group_context_extensions")?.groupContextExtensions.extensions

// stage keeps a commit's new state until confirm, and answers with the commit and what goes with it.
async function stage(c, commit, w, state) {
  c.staged = state
  return {
    Message: base64(mls.encodeMlsMessage(commit)),
    Welcome: welcome(w),
    GroupInfo: await describe(c, state, false),
    Tree: base64(encodeRatchetTree(state.ratchetTree)),
  }
}

const ops = {
  async reset() {
    clients.clear()
  },

  async supported() {
    return { Suites: Object.values(mls.ciphersuites), Proposals: Object.values(mls.defaultProposalTypes) }
  },

  async keyPackage(c, r) {
    const name = Object.entries(mls.ciphersuites).find(([, v]) => v === r.Suite)[0]
    const suite = composed.find((s) => s.name === name) ?? mls.getCiphersuiteFromName(name)
    c.suite = await implement(suite)
    c.psks = psks(r.PSKs)
    const capabilities = mls.defaultCapabilities()
    const now = BigInt(Math.floor(Date.now() / 1000))
    const { publicPackage, privatePackage } = await mls.generateKeyPackageWithKey(
      r.Certificates
        ? { credentialType: "x509", certificates: r.Certificates.map(bytes) }
        : { credentialType: "basic", identity: bytes(r.Identity) },
      { ...capabilities, ciphersuites: [name, ...capabilities.ciphersuites.filter((s) => s !== name)], ...r.Capabilities },
      { notBefore: now - 3600n, notAfter: now + 86400n * 28n },
      extensions(r.Extensions),
      await signatureKey(c.suite, suite.signature),
      c.suite,
      extensions(r.LeafExtensions),
    )
    Object.assign(c, { keyPackage: publicPackage, keys: privatePackage })
    return { Message: message("mls_key_package", "keyPackage", publicPackage) }
  },

  async create(c, r) {
    c.state = await mls.createGroup(bytes(r.GroupID), c.keyPackage, c.keys, extensions(r.Extensions), c.suite)
  },

  async join(c, r) {
    const m = received(r.Welcome)
    const index = mls.makePskIndex(undefined, c.psks)
    c.state = await mls.joinGroup(m.welcome, c.keyPackage, c.keys, index, c.suite, tree(r.Tree))
  },

  // lead makes the group that follows from another client's: a branch if it has an identifier, else the successor.
  async lead(c, r) {
    const { state } = clients.get(r.From)
    const others = r.KeyPackages.map((b) => received(b).keyPackage)
    const { reinit } = state.groupActiveState
    const { newState, welcome: w } = r.GroupID
      ? await mls.branchGroup(state, c.keyPackage, c.keys, others, bytes(r.GroupID), c.suite)
      : await mls.reinitCreateNewGroup(
          state, c.keyPackage, c.keys, others, reinit.groupId, reinit.cipherSuite, reinit.extensions)
    c.state = newState
    return { Welcome: welcome(w), Tree: base64(encodeRatchetTree(newState.ratchetTree)) }
  },

  async follow(c, r) {
    const { state } = clients.get(r.From)
    const w = received(r.Welcome).welcome
    c.state = r.Branch
      ? await mls.joinGroupFromBranch(state, w, c.keyPackage, c.keys, tree(r.Tree), c.suite)
      : await mls.joinGroupFromReinit(state, w, c.keyPackage, c.keys, tree(r.Tree))
  },

  async externalJoin(c, r) {
    const info = received(r.GroupInfo).groupInfo
    const { publicMessage, newState } = await mls.joinGroupExternal(
      info, c.keyPackage, c.keys, r.Resync ?? false, readsExternalPub(c.suite, info), tree(r.Tree), undefined, bytes(r.AAD))
    return stage(c, { version: "mls10", wireformat: "mls_public_message", publicMessage }, undefined, newState)
  },

  async propose(c, r) {
    const [p] = proposals([r.Proposal])
    const { newState, message: m } = await mls.createProposal(c.state, !r.Private, p, c.suite, bytes(r.AAD))
    c.state = newState
    return { Message: base64(mls.encodeMlsMessage(m)) }
  },

  async proposeFromOutside(c, r) {
    const info = received(r.GroupInfo).groupInfo
    info.groupContext.extensions = info.groupContext.extensions.flatMap(senderByItself)
    const m = r.Proposal
      ? await mls.proposeExternal(info, proposals([r.Proposal])[0], c.keyPackage.leafNode.signaturePublicKey,
          c.keys.signaturePrivateKey, c.suite)
      : await mls.proposeAddExternal(info, c.keyPackage, c.keys, c.suite)
    return { Message: base64(mls.encodeMlsMessage(m)) }
  },

  // ts-mls has no call that makes an Update: the leaf is built here and its key put in place before the commit.
  async update(c, r) {
    const keys = await c.suite.hpke.generateKeyPair()
    const own = c.state.privatePath.leafIndex
    const { signaturePublicKey, credential, capabilities, extensions } = c.state.ratchetTree[2 * own].leaf
    const hpkePublicKey = await c.suite.hpke.exportPublicKey(keys.publicKey)
    const leaf = { hpkePublicKey, signaturePublicKey, credential, capabilities, leafNodeSource: "update", extensions }
    const tbs = encodeLeafNodeTBS({ ...leaf, groupId: c.state.groupContext.groupId, leafIndex: own })
    leaf.signature = await signWithLabel(c.state.signaturePrivateKey, "LeafNodeTBS", tbs, c.suite.signature)
    const p = { proposalType: "update", update: { leafNode: leaf } }
    const { newState, message: m } = await mls.createProposal(c.state, !r.Private, p, c.suite, bytes(r.AAD))
    c.state = newState
    c.update = await c.suite.hpke.exportPrivateKey(keys.privateKey)
    return { Message: base64(mls.encodeMlsMessage(m)) }
  },

  async commit(c, r) {
    const byValue = proposals(r.Proposals)
    const all = [...Object.values(c.state.unappliedProposals).map((p) => p.proposal), ...byValue]
    const context = {
      state: c.state,
      cipherSuite: pathsWith(c.suite, () => renewal(all)),
      pskIndex: mls.makePskIndex(c.state, c.psks),
    }
    const { newState, welcome, commit } = await mls.createCommit(context, {
      wireAsPublicMessage: !r.Private,
      extraProposals: byValue,
      ratchetTreeExtension: r.TreeInWelcome ?? false,
      authenticatedData: bytes(r.AAD),
    })
    return stage(c, commit, welcome, newState)
  },

  async confirm(c) {
    c.state = c.staged
    c.staged = c.update = undefined
  },

  async drop(c) {
    c.staged = undefined
  },

  async process(c, r) {
    let state = c.state
    const own = state.privatePath.leafIndex
    let kind // of what was received
    let updates, removes, extensions // whether the commit applies this client's Update, a Remove of it; new extensions
    const run = (answer) => {
      // Not processMessage, which forgets the PSKs when it gets a PrivateMessage.
      const { publicMessage, privateMessage } = received(r.Message)
      const [process, m] = publicMessage
        ? [mls.processPublicMessage, publicMessage]
        : [mls.processPrivateMessage, privateMessage]
      const suite = pathsWith(c.suite, () => extensions)
      return process(state, m, mls.makePskIndex(state, c.psks), suite, (m) => {
        const has = (f) => m.kind === "commit" && m.proposals.some(f)
        kind = m.kind
        if (m.kind === "commit") extensions = renewal(m.proposals.map((p) => p.proposal))
        updates = has((p) => p.proposal.proposalType === "update" && p.senderLeafIndex === own)
        removes = has((p) => p.proposal.proposalType === "remove" && p.proposal.remove.removed === own)
        return answer
      })
    }
    if (c.update) {
      await run("reject").catch(() => {})
      if (updates) state = { ...state, privatePath: updateLeafKey(state.privatePath, c.update) }
    }
    let out
    try {
      out = await run("accept")
    } catch (e) {
      // ts-mls looks for its key in the path when a commit removes it and adds somebody at its leaf (RFC 9420,
      // Sections 12.1.3 and 12.3: the Remove empties the leaf before the Add fills it, and there is nothing to read).
      if (!removes || e.name !== "InternalError") throw e
      out = { newState: { ...state, groupActiveState: { kind: "removedFromGroup" } } }
    }
    c.state = out.newState
    if (out.kind === "applicationMessage") return { Kind: "application", Data: base64(out.message) }
    if (kind === "commit") c.staged = c.update = undefined
    return { Kind: kind }
  },

  async send(c, r) {
    const { newState, privateMessage } = await mls.createApplicationMessage(c.state, bytes(r.Data), c.suite, bytes(r.AAD))
    c.state = newState
    return { Message: message("mls_private_message", "privateMessage", privateMessage) }
  },

  async groupInfo(c, r) {
    return { GroupInfo: await describe(c, c.state, r.WithTree), Tree: base64(encodeRatchetTree(c.state.ratchetTree)) }
  },

  async status(c) {
    const s = c.state
    const secret = await mls.mlsExporter(s.keySchedule.exporterSecret, "interop", bytes("Y29udGV4dA=="), 32, c.suite)
    return {
      Active: s.groupActiveState.kind,
      Leaf: s.privatePath.leafIndex,
      Context: base64(encodeGroupContext(s.groupContext)),
      Authenticator: base64(s.keySchedule.epochAuthenticator),
      Exported: base64(secret),
    }
  },
}

for await (const line of createInterface({ input: process.stdin })) {
  let answer
  try {
    const r = JSON.parse(line)
    if (!clients.has(r.Client)) clients.set(r.Client, {})
    answer = (await ops[r.Op](clients.get(r.Client), r)) ?? {}
  } catch (e) {
    answer = { Error: `${e?.name ?? "error"}: ${e?.message ?? e}` }
  }
  process.stdout.write(JSON.stringify(answer) + "\n")
}
