// Package oci pulls and pushes small artifacts from and to OCI registries:
// policy bundles, locks, sigstore bundles, and the manifests that carry them.
//
// # The life of a pull
//
// Resolve turns a tag into a digest, once. From there on everything is named by
// digest: Manifest and Blob read what the digest names, up to a cap, hash all of
// it while reading, and return bytes only when the hash is right. Referrers lists
// what refers to a manifest by the OCI 1.1 API, and by the fallback tag
// (sha256-HEX, an index) where the registry has no such API. What a listing says
// is a hint: the artifact type is read from the manifest itself.
//
// Push uploads the layers, an empty configuration and a manifest. With a Subject
// it is a referrer; when the registry does not say that it took note (header
// OCI-Subject), the fallback tag's index is extended.
//
// # Hosts
//
// References name their registry; there is no default one. Plain HTTP is spoken
// with literal loopback hosts (localhost, 127.0.0.0/8, ::1) and, with
// Options.PlainHTTP, with any. Options.Mirror sends all requests to another base
// URL, such as a relay's, with the repository's path unchanged.
//
// A registry may redirect. Where a request may go is decided twice, on the host
// before the request and on the resolved address when dialling, so that a DNS
// alias does not help: see Options.Hosts. Credentials go to the registry they are
// for and never to another host. Proxy variables of the environment are not used.
//
// # Limits
//
// Manifests 4 MiB, blobs 1 MiB, a request 60 s, unless Options say otherwise; 10
// redirects; 1,024 referrers on 16 pages. A response over a limit is refused as
// soon as that is known.
//
// Errors wrap ErrNotFound, ErrUnauthorized, ErrDigest, ErrTooLarge, ErrMediaType,
// ErrHost or ErrReference where a caller may want to branch. A Client is safe for
// concurrent use. This package knows nothing of signatures and links neither
// sigstore nor OPA. Who may import it: node/release, the command line.
package oci
