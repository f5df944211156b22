package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cedar-policy/cedar-go"
	cedartypes "github.com/cedar-policy/cedar-go/types"

	"github.com/autonomyops/autonomy/bench/peers/policyleg"
)

// cedarPolicy is a policy set, its entities, and how a call is put to it.
type cedarPolicy struct {
	set      *cedar.PolicySet
	entities cedar.EntityMap
	request  func(input []byte) (cedar.Request, error)
}

func openCedar(dir string) (leg.Policy, error) {
	text, err := os.ReadFile(filepath.Join(dir, "policy.cedar"))
	if err != nil {
		return nil, err
	}
	set, err := cedar.NewPolicySetFromBytes("policy.cedar", text)
	if err != nil {
		return nil, err
	}
	_, data, err := read(dir)
	if err != nil {
		return nil, err
	}
	p := &cedarPolicy{set: set, entities: cedar.EntityMap{}}
	switch {
	case data["desks"] != nil:
		p.request = deskRequest
		err = reread(data, func(d deskData) { d.entities(p.entities) })
	case data["senders"] != nil:
		p.request = mailRequest
		err = reread(data, func(d mailData) { d.entities(p.entities) })
	default:
		err = fmt.Errorf("%s has data of no policy that is known here", dir)
	}
	return p, err
}

func (p *cedarPolicy) Decider() leg.Decider {
	return func(dst, input []byte) ([]byte, error) {
		req, err := p.request(input)
		if err != nil {
			return dst, err
		}
		decision, diag := cedar.Authorize(p.set, p.entities, req)
		dst = append(dst, `{"allow":`...)
		if decision == cedar.Allow {
			return append(dst, `true,"reasons":[]}`...), nil
		}
		dst = append(dst, `false,"reasons":[`...)
		for i, r := range diag.Reasons {
			if i > 0 {
				dst = append(dst, ',')
			}
			dst = append(dst, '"')
			dst = append(append(dst, r.PolicyID...), '"')
		}
		return append(dst, `]}`...), nil
	}
}

// reread gives data its types.
func reread[T any](data map[string]any, fill func(T)) error {
	raw, err := json.Marshal(data)
	if err != nil {
		return err
	}
	var typed T
	if err := json.Unmarshal(raw, &typed); err != nil {
		return err
	}
	fill(typed)
	return nil
}

func record(m cedar.RecordMap) cedar.Record { return cedar.NewRecord(m) }

func set(of []string) cedar.Set {
	values := make([]cedar.Value, len(of))
	for i, s := range of {
		values[i] = cedar.String(s)
	}
	return cedar.NewSet(values...)
}

type deskData struct {
	Desks map[string]struct {
		RiskCeiling int64  `json:"risk_ceiling"`
		Purse       string `json:"purse"`
		Grants      map[string]struct {
			Hosts    []string `json:"hosts"`
			MaxCents int64    `json:"max_cents"`
		} `json:"grants"`
	} `json:"desks"`
	Tools map[string]struct {
		Family string   `json:"family"`
		Risk   int64    `json:"risk"`
		Fee    int64    `json:"fee"`
		Labels []string `json:"labels"`
	} `json:"tools"`
	Sites map[string]struct {
		Closed bool `json:"closed"`
	} `json:"sites"`
	Purses map[string]struct {
		Cents int64 `json:"cents"`
	} `json:"purses"`
}

func (d deskData) entities(out cedar.EntityMap) {
	add := func(kind, id string, attributes cedar.RecordMap) {
		uid := cedar.NewEntityUID(cedar.EntityType(kind), cedar.String(id))
		out[uid] = cedar.Entity{UID: uid, Attributes: record(attributes)}
	}
	for name, s := range d.Sites {
		add("Site", name, cedar.RecordMap{"closed": cedar.Boolean(s.Closed)})
	}
	for name, desk := range d.Desks {
		add("Desk", name, cedar.RecordMap{"risk_ceiling": cedar.Long(desk.RiskCeiling), "purse_cents": cedar.Long(d.Purses[desk.Purse].Cents)})
		for kind, grant := range desk.Grants {
			tool := d.Tools[kind]
			add("Grant", name+"/"+kind, cedar.RecordMap{"family": cedar.String(tool.Family), "risk": cedar.Long(tool.Risk), "fee": cedar.Long(tool.Fee),
				"labels": set(tool.Labels), "hosts": set(grant.Hosts), "max_cents": cedar.Long(grant.MaxCents)})
		}
	}
}

func deskRequest(input []byte) (cedar.Request, error) {
	var in struct {
		Kind   string `json:"kind"`
		Params struct {
			Path     string `json:"path"`
			Endpoint string `json:"endpoint"`
			Note     string `json:"note"`
			Cents    int64  `json:"cents"`
		} `json:"params"`
		Node struct {
			Labels map[string]string `json:"labels"`
		} `json:"node"`
	}
	if err := json.Unmarshal(input, &in); err != nil {
		return cedar.Request{}, err
	}
	labels := make([]cedar.Value, 0, len(in.Node.Labels))
	for name := range in.Node.Labels {
		labels = append(labels, cedar.String(name))
	}
	host := ""
	if parts := strings.SplitN(in.Params.Endpoint, "/", 4); len(parts) > 2 {
		host, _, _ = strings.Cut(strings.ToLower(parts[2]), ":")
	}
	desk := in.Node.Labels["desk"]
	return cedar.Request{
		Principal: cedar.NewEntityUID("Desk", cedar.String(desk)),
		Action:    cedar.NewEntityUID("Action", "call"),
		Resource:  cedar.NewEntityUID("Grant", cedar.String(desk+"/"+in.Kind)),
		Context: record(cedar.RecordMap{
			"labels": cedar.NewSet(labels...), "site": cedar.NewEntityUID("Site", cedar.String(in.Node.Labels["site"])), "host": cedar.String(host),
			"path": cedar.String(in.Params.Path), "endpoint": cedar.String(in.Params.Endpoint), "note": cedar.String(in.Params.Note), "cents": cedar.Long(in.Params.Cents)}),
	}, nil
}

type mailData struct {
	Senders map[string]struct {
		Unit   string `json:"unit"`
		Level  int64  `json:"level"`
		Always bool   `json:"always"`
	} `json:"senders"`
	Units map[string]struct {
		Domains []string `json:"domains"`
		Tables  []string `json:"tables"`
		Bytes   int64    `json:"bytes"`
	} `json:"units"`
	Channels map[string]struct {
		Level int64    `json:"level"`
		MaxTo int64    `json:"max_to"`
		Bytes int64    `json:"bytes"`
		Types []string `json:"types"`
		Hours []int64  `json:"hours"`
	} `json:"channels"`
}

func (d mailData) entities(out cedar.EntityMap) {
	add := func(kind, id string, attributes cedar.RecordMap) {
		uid := cedar.NewEntityUID(cedar.EntityType(kind), cedar.String(id))
		out[uid] = cedar.Entity{UID: uid, Attributes: record(attributes)}
	}
	for name, u := range d.Units {
		add("Unit", name, cedar.RecordMap{"domains": set(u.Domains), "tables": set(u.Tables), "bytes": cedar.Long(u.Bytes)})
	}
	for name, s := range d.Senders {
		add("Sender", name, cedar.RecordMap{"unit": cedar.NewEntityUID("Unit", cedar.String(s.Unit)), "level": cedar.Long(s.Level), "always": cedar.Boolean(s.Always)})
	}
	for name, c := range d.Channels {
		add("Channel", name, cedar.RecordMap{"level": cedar.Long(c.Level), "max_to": cedar.Long(c.MaxTo), "bytes": cedar.Long(c.Bytes), "types": set(c.Types),
			"from_hour": cedar.Long(c.Hours[0]), "to_hour": cedar.Long(c.Hours[1])})
	}
}

func mailRequest(input []byte) (cedar.Request, error) {
	var in struct {
		Kind   string `json:"kind"`
		Params struct {
			To      []string         `json:"to"`
			Subject string           `json:"subject"`
			Files   map[string]int64 `json:"files"`
			Tables  []string         `json:"tables"`
		} `json:"params"`
		Caller struct {
			Address string `json:"address"`
		} `json:"caller"`
		Agent struct {
			ID string `json:"id"`
		} `json:"agent"`
		TimeNS int64 `json:"time_ns"`
	}
	if err := json.Unmarshal(input, &in); err != nil {
		return cedar.Request{}, err
	}
	var domains, types []string
	for _, to := range in.Params.To {
		_, domain, _ := strings.Cut(strings.ToLower(to), "@")
		domains = append(domains, domain)
	}
	var size int64
	for name, n := range in.Params.Files {
		if t := strings.TrimPrefix(filepath.Ext(strings.ToLower(name)), "."); !slices.Contains(types, t) {
			types = append(types, t)
		}
		size += n
	}
	from, err := cedartypes.ParseIPAddr(in.Caller.Address)
	if err != nil {
		return cedar.Request{}, err
	}
	return cedar.Request{
		Principal: cedar.NewEntityUID("Sender", cedar.String(in.Agent.ID)),
		Action:    cedar.NewEntityUID("Action", "send"),
		Resource:  cedar.NewEntityUID("Channel", cedar.String(in.Kind)),
		Context: record(cedar.RecordMap{
			"recipients": cedar.Long(len(in.Params.To)), "domains": set(domains), "types": set(types), "bytes": cedar.Long(size), "tables": set(in.Params.Tables),
			"hour": cedar.Long(time.Unix(0, in.TimeNS).UTC().Hour()), "subject": cedar.String(strings.ToLower(in.Params.Subject)), "from": from}),
	}, nil
}
