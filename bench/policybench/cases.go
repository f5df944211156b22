package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// A policyCase is a policy with data and sample calls: all of it but the policy
// itself is made here, from numbers, so every run of every version measures the
// same.
type policyCase struct {
	name  string
	data  map[string]any
	calls []sample
	// rego overrides testdata/NAME/policy.rego; there is no Cedar then.
	rego string
}

type sample struct {
	name  string // allow_… or deny_…
	input map[string]any
}

//go:embed testdata/*/policy.*
var policies embed.FS

type obj = map[string]any

// write puts the files of a leg into dir.
func (c policyCase) write(dir string) error {
	if err := os.MkdirAll(filepath.Join(dir, "inputs"), 0o755); err != nil {
		return err
	}
	data, err := json.Marshal(c.data)
	if err != nil {
		return err
	}
	rego := []byte(c.rego)
	files := map[string][]byte{"data.json": data}
	if c.rego == "" {
		if rego, err = policies.ReadFile("testdata/" + c.name + "/policy.rego"); err != nil {
			return err
		}
		if files["policy.cedar"], err = policies.ReadFile("testdata/" + c.name + "/policy.cedar"); err != nil {
			return err
		}
	}
	files["policy.rego"] = rego
	if files["bundle.tar.gz"], err = c.bundle(rego, data); err != nil {
		return err
	}
	for _, s := range c.calls {
		input, err := json.Marshal(s.input)
		if err != nil {
			return err
		}
		files[filepath.Join("inputs", s.name+".json")] = input
	}
	for name, content := range files {
		err = errors.Join(err, os.WriteFile(filepath.Join(dir, name), content, 0o644))
	}
	return err
}

// bundle packs policy and data as autonomy policy build does, without the
// compiling and probing that takes its time with a large policy.
func (c policyCase) bundle(rego, data []byte) ([]byte, error) {
	roots := append(slices.Sorted(maps.Keys(c.data)), "autonomy")
	manifest, err := json.Marshal(obj{"revision": "1", "rego_version": 1, "roots": roots,
		"metadata": obj{"autonomy": obj{"name": c.name, "version": "1.0.0"}}})
	if err != nil {
		return nil, err
	}
	var buf bytes.Buffer
	zw := gzip.NewWriter(&buf)
	tw := tar.NewWriter(zw)
	for _, f := range []struct {
		name string
		data []byte
	}{{".manifest", manifest}, {"data.json", data}, {"policy.rego", rego}} {
		err = errors.Join(err, tw.WriteHeader(&tar.Header{Name: f.name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(f.data))}))
		_, werr := tw.Write(f.data)
		err = errors.Join(err, werr)
	}
	err = errors.Join(err, tw.Close(), zw.Close())
	return buf.Bytes(), err
}

// Sizes of the data, which make about 240 KB of JSON each.
const (
	desks   = 24
	tools   = 180
	granted = 60 // tools of a desk
	senders = 900
	units   = 40
)

var families = []string{"file", "web", "refund", "mail", "db", "note"}

// pick is a number below n that looks like none in particular and is always the
// same.
func pick(n int, of ...int) int {
	h := uint64(14695981039346656037)
	for _, x := range of {
		h = (h ^ uint64(x)) * 1099511628211
		h ^= h >> 29
	}
	return int(h % uint64(n))
}

func toolName(i int) string { return fmt.Sprintf("tool.%s.op_%03d", families[i%len(families)], i) }

// desk is a policy of roles, grants and reasons.
func desk() policyCase {
	tool := obj{}
	for i := range tools {
		t := obj{"family": families[i%len(families)], "risk": pick(9, 1, i), "fee": pick(40, 2, i), "max_output": 1024 * (1 + pick(64, 3, i)),
			"labels": []string{"env"}, "redact": []string{}}
		if pick(3, 4, i) == 0 {
			t["labels"] = []string{"env", "team"}
		}
		if pick(5, 5, i) == 0 {
			t["redact"] = []string{"/params/token"}
		}
		tool[toolName(i)] = t
	}
	all := obj{}
	for d := range desks {
		grants := obj{}
		for g := range granted {
			i := (g*3 + d) % tools
			grant := obj{"per_minute": 10 * (1 + pick(9, 6, d, i))}
			switch families[i%len(families)] {
			case "file":
				grant["dirs"] = []string{"/workspace/", fmt.Sprintf("/srv/desk/%02d/", d), "/tmp/agent/"}
			case "web":
				hosts := []string{}
				for h := range 12 {
					hosts = append(hosts, fmt.Sprintf("service-%02d.internal.example.com", (d+h*7)%90))
				}
				grant["hosts"] = hosts
				grant["domains"] = []string{".example.net", ".desk.example", ".files.example.org"}
			case "refund":
				grant["max_cents"] = 500 * (1 + pick(40, 7, d, i))
			}
			grants[toolName(i)] = grant
		}
		all[fmt.Sprintf("desk-%02d", d)] = obj{"risk_ceiling": 5 + pick(4, 8, d), "redact_from": 4 + pick(4, 9, d),
			"purse": fmt.Sprintf("purse-%d", d%4), "grants": grants}
	}
	sites, purses := obj{}, obj{}
	for i := range 60 {
		sites[fmt.Sprintf("site-%02d", i)] = obj{"closed": i%10 == 9, "name": fmt.Sprintf("Building %d, floor %d", i/4, i%4)}
	}
	for i := range 4 {
		purses[fmt.Sprintf("purse-%d", i)] = obj{"cents": 40_000 + 1000*i}
	}
	data := obj{"desks": all, "tools": tool, "sites": sites, "purses": purses}

	// A call of a granted tool of a family whose risk the desk allows.
	find := func(d int, family string) string {
		ceiling := all[fmt.Sprintf("desk-%02d", d)].(obj)["risk_ceiling"].(int)
		for i := range tools {
			name := toolName(i)
			_, ok := all[fmt.Sprintf("desk-%02d", d)].(obj)["grants"].(obj)[name]
			if ok && families[i%len(families)] == family && tool[name].(obj)["risk"].(int) <= ceiling {
				return name
			}
		}
		panic("desk " + fmt.Sprint(d) + " has no tool of " + family) // the numbers above are constants
	}
	call := func(d int, kind string, params obj, labels obj) obj {
		l := obj{"desk": fmt.Sprintf("desk-%02d", d), "site": "site-12", "env": "prod", "team": "billing", "region": "eu-west-1", "ticket": "OPS-18233"}
		for k, v := range labels {
			if l[k] = v; v == nil {
				delete(l, k)
			}
		}
		return obj{"kind": kind, "params": params, "session": "01JDB9K3W7Q2ZV8N5T6YHMXR4C",
			"caller":  obj{"type": "uid", "id": "1000", "uid": 1000, "gid": 1000, "pid": 48121},
			"agent":   obj{"id": "desk-agent", "release": "stable-118", "fingerprint": "blake3:6b1f0d5c0f9a3b7e8d2c4a6f1e3b5d7c9a0f2e4d6c8b1a3f5e7d9c0b2a4f6e8d"},
			"node":    obj{"id": "node-7f3a91c2", "labels": l, "assurance": "full"},
			"time_ns": 1_795_378_449_123_456_789}
	}
	note := "The customer asked for the current state of the order before the call ends."
	web := obj{"endpoint": "https://raw.files.example.org/acme/deploy/main/values.yaml", "method": "GET", "accept": "application/yaml", "note": note}
	file := func(path string) obj {
		return obj{"path": path, "mode": "r", "max_bytes": 65536, "encoding": "utf-8", "note": note}
	}
	return policyCase{name: "desk", data: data, calls: []sample{
		{"allow_web", call(1, find(1, "web"), web, nil)},
		{"allow_file", call(6, find(6, "file"), file("/workspace/orders/2026/11/report.csv"), nil)},
		{"allow_refund", call(2, find(2, "refund"), obj{"cents": 400, "currency": "EUR", "order": "A-99120", "note": note}, nil)},
		{"allow_note", call(5, find(5, "note"), obj{"text": "Called back, order confirmed.", "note": note}, nil)},
		{"deny_path", call(6, find(6, "file"), file("/workspace/../etc/shadow"), nil)},
		{"deny_host", call(1, find(1, "web"), obj{"endpoint": "http://collect.evil.test:8443/x", "method": "POST", "note": note}, nil)},
		{"deny_many", call(2, find(2, "refund"), obj{"cents": 90_000, "currency": "EUR", "note": "key AKIAABCDEFGHIJKLMNOP in text"}, obj{"env": nil, "site": "site-19"})},
		{"deny_not_granted", call(3, toolName(4), obj{"query": "select 1", "note": note}, nil)},
	}}
}

// mail is a policy of sets, patterns and numbers, written after the evaluator
// was: nothing was tuned for it.
func mail() policyCase {
	people, house, channels := obj{}, obj{}, obj{}
	for s := range senders {
		people[fmt.Sprintf("agent-%04d", s)] = obj{"unit": fmt.Sprintf("unit-%02d", s%units), "level": 1 + pick(5, 1, s), "always": pick(4, 2, s) == 0,
			"owner": fmt.Sprintf("owner-%03d@house.example", pick(400, 3, s)), "since": fmt.Sprintf("2026-%02d-%02d", 1+pick(12, 4, s), 1+pick(28, 5, s)),
			"purpose": "answers the questions that customers send to the shared mailbox", "cost_center": 4000 + pick(900, 6, s)}
	}
	for u := range units {
		domains, tables := []string{"house.example", "house.test"}, []string{}
		for i := range 30 {
			domains = append(domains, fmt.Sprintf("customer-%03d.example.com", (u*11+i*13)%500))
			tables = append(tables, fmt.Sprintf("unit_%02d.table_%03d", u, i))
		}
		house[fmt.Sprintf("unit-%02d", u)] = obj{"domains": domains, "tables": tables, "bytes": 1 << 20,
			"partners": []string{"*.partner.example", "*.agency.example"}, "networks": []string{"10.0.0.0/8", "192.168.0.0/16"}}
	}
	for i, name := range []string{"tool.mail_send", "tool.chat_post", "tool.fax_send", "tool.export"} {
		channels[name] = obj{"level": 1 + i, "max_to": 12 - 2*i, "bytes": 4 << 20, "types": []string{"pdf", "txt", "csv", "png"},
			"hours": []int{6, 20}, "timeout_ms": 5000 + 1000*i}
	}
	words := []string{"confidential", "password", "wire transfer", "gift card"}
	data := obj{"senders": people, "units": house, "channels": channels, "words": words}

	// A sender of a level, on duty at all hours or not.
	find := func(level int, always bool) int {
		for s := range senders {
			if p := people[fmt.Sprintf("agent-%04d", s)].(obj); p["level"].(int) >= level && p["always"].(bool) == always {
				return s
			}
		}
		panic("no such sender") // the numbers above are constants
	}
	call := func(sender int, kind string, params obj, address string, hour int) obj {
		return obj{"kind": kind, "params": params, "session": "s-20261122-1142",
			"caller":  obj{"type": "uid", "id": "1000", "uid": 1000, "address": address},
			"agent":   obj{"id": fmt.Sprintf("agent-%04d", sender), "release": "stable-7", "fingerprint": "blake3:0f2e4d6c8b1a3f5e7d9c0b2a4f6e8d6b1f0d5c0f9a3b7e8d2c4a6f1e3b5d7c"},
			"node":    obj{"id": "node-11", "labels": obj{"site": "hall-2", "env": "prod"}, "assurance": "reduced"},
			"time_ns": (1_795_305_600 + int64(hour)*3600) * 1_000_000_000}
	}
	domain := func(sender, i int) string {
		return house[fmt.Sprintf("unit-%02d", sender%units)].(obj)["domains"].([]string)[i]
	}
	body := strings.Repeat("Thank you for your order, it leaves our house today. ", 4)
	params := func(s int, subject string, extra obj) obj {
		p := obj{"to": []string{"anna@" + domain(s, 3), "ben@" + domain(s, 9), "archive@house.example"}, "subject": subject, "body": body,
			"files": obj{"invoice.pdf": 182_044, "lines.csv": 20_112}, "tables": []string{fmt.Sprintf("unit_%02d.table_004", s%units), fmt.Sprintf("unit_%02d.table_021", s%units)}}
		for k, v := range extra {
			p[k] = v
		}
		return p
	}
	day, night := find(3, false), find(4, true)
	return policyCase{name: "mail", data: data, calls: []sample{
		{"allow_mail", call(day, "tool.mail_send", params(day, "Your order A-99120", nil), "10.1.2.3", 9)},
		{"allow_chat", call(day, "tool.chat_post", params(day, "Stand-up notes", obj{"files": obj{}}), "192.168.7.9", 19)},
		{"allow_night", call(night, "tool.export", params(night, "Nightly lines", nil), "10.200.0.1", 2)},
		{"allow_fax", call(night, "tool.fax_send", params(night, "Order form", obj{"tables": []string{}}), "10.0.0.77", 12)},
		{"deny_domain", call(day, "tool.mail_send", params(day, "Your order A-99121", obj{"to": []string{"x@evil.test"}}), "10.1.2.3", 9)},
		{"deny_hours", call(day, "tool.chat_post", params(day, "Late notes", nil), "10.1.2.3", 23)},
		{"deny_many", call(day, "tool.export", params(day, "The password list", obj{"files": obj{"all.zip": 90_000_000}, "tables": []string{"payroll"}}), "203.0.113.9", 3)},
		{"deny_sender", call(senders+1, "tool.mail_send", params(0, "Hello", nil), "10.1.2.3", 9)},
	}}
}

// Sizes of the large case.
const (
	largeRego = 1 << 20
	largeData = 10 << 20
)

// large is 1 MiB of rules and 10 MiB of data.
func large() policyCase {
	var b strings.Builder
	b.WriteString("package autonomy\n\nimport rego.v2\n\ndecision := {\"allow\": count(reasons) == 0, \"reasons\": reasons}\n\n")
	for i := 0; b.Len() < largeRego; i++ {
		fmt.Fprintf(&b, "reasons contains \"r%05d\" if {\n\tinput.kind == \"tool.op_%05d\"\n\tnot input.params.amount <= data.groups[\"group-%05d\"].limit\n}\n\n", i, i, i%20_000)
	}
	groups := obj{}
	for i, size := 0, 0; size < largeData; i++ {
		name := fmt.Sprintf("group-%05d", i)
		g := obj{"limit": 100 + i%900, "owner": fmt.Sprintf("owner-%04d@house.example", pick(3000, 1, i)), "open": i%2 == 0,
			"members": []string{fmt.Sprintf("agent-%05d", i), fmt.Sprintf("agent-%05d", i+1), fmt.Sprintf("agent-%05d", i+2)},
			"note":    "what this group may do is told by its members; a limit is in cents of one call"}
		groups[name] = g
		size += len(name) + 206
	}
	call := func(kind string, amount int) obj { return obj{"kind": kind, "params": obj{"amount": amount}} }
	return policyCase{name: "large", rego: b.String(), data: obj{"groups": groups}, calls: []sample{
		{"allow_unknown", call("tool.echo", 1)}, {"allow_small", call("tool.op_00017", 7)}, {"deny_large", call("tool.op_00017", 70_000)},
	}}
}
