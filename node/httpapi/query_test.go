package httpapi_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"strings"
	"testing"

	"github.com/autonomyops/autonomy/internal/auth"
	"github.com/autonomyops/autonomy/internal/event"
	"github.com/autonomyops/autonomy/internal/otlp"
)

const jsonType = "Content-Type: application/json\r\n"

// decisions are the decision records of the log; there must be no others.
func (a *api) decisions() (out []event.DecisionBody) {
	a.t.Helper()
	if err := a.log.Sync(a.t.Context()); err != nil {
		a.t.Fatal(err)
	}
	for seq := uint64(1); seq <= a.log.Durable(); seq++ {
		payload, _, err := a.log.Get(seq)
		if err != nil {
			a.t.Fatal(err)
		}
		rec, err := otlp.Parse(payload)
		if err != nil {
			a.t.Fatal(err)
		}
		var d event.DecisionBody
		if err := json.Unmarshal(rec.Body, &d); err != nil || rec.EventType != event.Decision {
			a.t.Fatalf("record %d: %s, %v", seq, rec.EventType, err)
		}
		out = append(out, d)
	}
	return out
}

func (a *api) ask(path, body string) (int, string) {
	a.t.Helper()
	resp, out := a.request("POST", path, jsonType, body)
	return resp.StatusCode, out
}

// TestData: OPA's Data API, as its clients send and read it.
func TestData(t *testing.T) {
	a := serveWith(t, `package autonomy
import rego.v2
default decision := {"allow": false, "reasons": ["no"]}
decision := {"allow": true, "constraints": {"timeout_ms": 5, "egress": []}, "redact": ["/params/text"]} if input.kind == "tool.echo"
decision := {"allow": true} if input.kind == "tool.elsewhere.x"
`, nil)
	const input = `{"input":{"kind":"tool.echo","params":{"text":"hi"}}}`
	for _, tc := range []struct{ rule, body, want string }{
		{"allow", input, "true"},
		{"decision", input, `{"allow":true,"reasons":[],"constraints":{"timeout_ms":5,"egress":[]},"redact":["/params/text"],"policy_ref":"t@1.0.0"}`},
		{"decision/allow", input, "true"},
		{"constraints/timeout_ms", input, "5"},
		{"reasons", input, "[]"},
		{"allow", `{"input":{"kind":"tool.shell","params":{"command":"id"}}}`, "false"},
		{"reasons", `{"input":{"kind":"tool.shell","params":{"command":"id"}}}`, `[{"message":"no"}]`},
		{"allow", `{"input":{"kind":"tool.elsewhere.x","params":{"a":1},"session":"s"}}`, "true"}, // no tool of this node
		{"nothing", input, ""},
		{"allow/x", input, ""},
		{"decision/constraints/x", input, ""},
	} {
		status, out := a.ask("/v1/data/autonomy/"+tc.rule, tc.body)
		var got struct {
			DecisionID string          `json:"decision_id"`
			Result     json.RawMessage `json:"result"`
			Warning    *struct{ Code string }
		}
		if err := json.Unmarshal([]byte(out), &got); err != nil || status != 200 || string(got.Result) != tc.want || got.DecisionID == "" || (got.Warning == nil) != (tc.want != "") {
			t.Errorf("%s of %s: %d %s (%v), want %s", tc.rule, tc.body, status, out, err, tc.want)
		}
	}
	recs := a.decisions()
	if len(recs) != 11 {
		t.Fatalf("%d decisions are recorded, want 11, and nothing executed", len(recs))
	}
	for _, d := range recs {
		if !d.DryRun || !strings.Contains(string(d.Input), `"caller":{"type":"anonymous"`) {
			t.Errorf("%+v", d)
		}
	}

	for name, tc := range map[string]struct {
		body   string
		status int
		want   string
	}{
		"no input":           {`{}`, 400, "input: "},
		"empty":              {``, 400, "input: "},
		"a trusted field":    {`{"input":{"kind":"tool.echo","caller":{"id":"root"}}}`, 400, "set by the node"},
		"a duplicate key":    {`{"input":{"kind":"tool.echo","kind":"tool.x"}}`, 400, "duplicate key"},
		"two inputs":         {`{"input":{"kind":"tool.echo"},"input":{"kind":"tool.x"}}`, 400, "duplicate key"},
		"another case":       {`{"Input":{"kind":"tool.echo"}}`, 400, "case-sensitive"},
		"no tool's name":     {`{"input":{"kind":"access.evaluation","params":{}}}`, 400, "no tool name"},
		"against the schema": {`{"input":{"kind":"tool.exec.wait","params":{"x":1}}}`, 400, "invalid params"},
	} {
		status, out := a.ask("/v1/data/autonomy/allow", tc.body)
		var p struct{ Code, Message string }
		if err := json.Unmarshal([]byte(out), &p); err != nil || status != tc.status || p.Code == "" || !strings.Contains(p.Message, tc.want) || strings.Contains(out, `"result"`) {
			t.Errorf("%s: %d %s, want %d %s", name, status, out, tc.status, tc.want)
		}
	}
	if resp, out := a.request("POST", "/v1/data/autonomy/allow", "", input); resp.StatusCode != 415 {
		t.Errorf("without a content type: %d %s", resp.StatusCode, out)
	}
	if resp, _ := a.request("GET", "/v1/data/autonomy/allow", "", ""); resp.StatusCode != 405 || resp.Header.Get("Allow") != "POST" {
		t.Errorf("GET: %d", resp.StatusCode)
	}
	for _, path := range []string{"/v1/data/autonomy/", "/v1/data/autonomy", "/v1/data/other/allow", "/v1/data"} {
		if status, out := a.ask(path, input); status != 404 {
			t.Errorf("%s: %d %s", path, status, out)
		}
	}
	if n := len(a.decisions()); n != 11 {
		t.Errorf("%d decisions: a bad request was evaluated", n)
	}
}

// TestQueriesFailClosed: without a decision that is recorded there is no answer
// that anyone could take for an allow.
func TestQueriesFailClosed(t *testing.T) {
	a := serve(t, nil)
	a.log.Close() // nothing can be recorded
	status, out := a.ask("/v1/data/autonomy/allow", `{"input":{"kind":"tool.echo"}}`)
	if status != 503 || strings.Contains(out, "result") {
		t.Errorf("%d %s", status, out)
	}
	const evaluation = `{"subject":{"type":"user","id":"a"},"action":{"name":"read"},"resource":{"type":"r","id":"1"}}`
	if status, out := a.ask("/access/v1/evaluation", evaluation); status != 503 || strings.Contains(out, "decision\"") {
		t.Errorf("%d %s", status, out)
	}
	status, out = a.ask("/access/v1/evaluations", `{"evaluations":[`+evaluation+`,`+evaluation+`]}`)
	if status != 200 || strings.Count(out, `"decision":false`) != 2 || strings.Count(out, `"status":503`) != 2 {
		t.Errorf("%d %s", status, out)
	}
	// What never became a query is refused in the words of its API, too.
	b, _ := withAuth(t, auth.Options{}, nil)
	for path, want := range map[string]string{"/access/v1/evaluation": `"no credential`, "/access/v1/evaluations": `"no credential`, "/v1/data/autonomy/allow": `{"code":"unauthenticated","message":"no credential`} {
		if status, out := b.ask(path, evaluation); status != 401 || !strings.HasPrefix(out, want) {
			t.Errorf("%s: %d %s", path, status, out)
		}
		if resp, out := b.request("POST", path, jsonType+"Origin: https://evil.test\r\n", evaluation); resp.StatusCode != 403 || strings.Contains(out, "decision\"") {
			t.Errorf("%s: %d %s", path, resp.StatusCode, out)
		}
		if resp, out := b.request("POST", path, jsonType, strings.Repeat("x", 5000)); resp.StatusCode != 413 && resp.StatusCode != 401 || strings.Contains(out, "result") {
			t.Errorf("%s: %d %s", path, resp.StatusCode, out)
		}
	}
	none := serveWith(t, "package autonomy\nimport rego.v2\nallow if input.x.y == 1\n", nil) // undefined for all
	if status, out := none.ask("/access/v1/evaluation", evaluation); status != 200 || !strings.HasPrefix(out, `{"decision":false`) {
		t.Errorf("undefined: %d %s", status, out)
	}
}

type todo struct {
	Users []struct {
		Name, Address, PID string
		Create             bool
	}
	Todos []struct {
		User, Owner    string
		Update, Delete bool
	}
	Batches []struct {
		User   string
		Owners []string
		Update []bool
	}
}

func authzen(t *testing.T) *api {
	t.Helper()
	rego, err := os.ReadFile("testdata/authzen/policy.rego")
	if err != nil {
		t.Fatal(err)
	}
	return serveWith(t, string(rego), nil)
}

func (a *api) evaluate(body string, want bool) {
	a.t.Helper()
	status, out := a.ask("/access/v1/evaluation", body)
	var d struct {
		Decision *bool
		Context  struct {
			AuditID string `json:"audit_id"`
		}
	}
	if err := json.Unmarshal([]byte(out), &d); err != nil || status != 200 || d.Decision == nil || *d.Decision != want || d.Context.AuditID == "" {
		a.t.Errorf("%s: %d %s, want %v", body, status, out, want)
	}
}

func (a *api) evaluateAll(body string, want ...bool) {
	a.t.Helper()
	status, out := a.ask("/access/v1/evaluations", body)
	var d struct{ Evaluations []struct{ Decision bool } }
	if err := json.Unmarshal([]byte(out), &d); err != nil {
		a.t.Fatal(err)
	}
	var got []bool
	for _, e := range d.Evaluations {
		got = append(got, e.Decision)
	}
	if status != 200 || fmt.Sprint(got) != fmt.Sprint(want) {
		a.t.Errorf("%s: %d %s, want %v", body, status, out, want)
	}
}

// TestAuthZENTodo: the published decisions of the Todo scenario, in the shapes
// of both drafts.
func TestAuthZENTodo(t *testing.T) {
	data, err := os.ReadFile("testdata/authzen/todo.json")
	if err != nil {
		t.Fatal(err)
	}
	var facts todo
	if err := json.Unmarshal(data, &facts); err != nil {
		t.Fatal(err)
	}
	a := authzen(t)
	address, subjects, n := map[string]string{}, map[string][2]string{}, 0
	for _, u := range facts.Users {
		address[u.Name] = u.Address
		subjects[u.Name] = [2]string{
			fmt.Sprintf(`{"type":"user","id":%q,"identity":%q}`, u.Address, u.PID), // first draft, with its extra member
			fmt.Sprintf(`{"type":"user","id":%q}`, u.PID),
		}
	}
	check := func(user, action, resource string, want bool, draft int) {
		t.Helper()
		a.evaluate(fmt.Sprintf(`{"subject":%s,"action":{"name":%q},"resource":%s,"context":{}}`, subjects[user][draft], action, resource), want)
		n++
	}
	for draft := range 2 {
		for _, u := range facts.Users {
			check(u.Name, "can_read_user", `{"type":"user","id":"beth@the-smiths.com","userID":"beth@the-smiths.com"}`, true, draft)
			check(u.Name, "can_read_user", fmt.Sprintf(`{"type":"user","id":%q,"userID":%q}`, u.Address, u.PID), true, draft)
			check(u.Name, "can_read_todos", `{"type":"todo","id":"todo-1"}`, true, draft)
			check(u.Name, "can_create_todo", `{"type":"todo","id":"todo-1"}`, u.Create, draft)
		}
		for _, d := range facts.Todos {
			resource := fmt.Sprintf(`{"type":"todo","id":"7240d0db-8ff0-41ec-98b2-34a096273b9f","properties":{"ownerID":%q}}`, address[d.Owner])
			if draft == 0 {
				resource = fmt.Sprintf(`{"type":"todo","id":"7240d0db-8ff0-41ec-98b2-34a096273b92","ownerID":%q}`, address[d.Owner])
			}
			check(d.User, "can_update_todo", resource, d.Update, draft)
			check(d.User, "can_delete_todo", resource, d.Delete, draft)
		}
	}
	for _, b := range facts.Batches {
		var items []string
		for _, o := range b.Owners {
			items = append(items, fmt.Sprintf(`{"resource":{"type":"todo","id":"7240d0db-8ff0-41ec-98b2-34a096273b9f","properties":{"ownerID":%q}}}`, address[o]))
		}
		a.evaluateAll(fmt.Sprintf(`{"subject":%s,"action":{"name":"can_update_todo"},"resource":{},"context":{},"evaluations":[%s]}`,
			subjects[b.User][1], strings.Join(items, ",")), b.Update...)
		n += len(b.Owners)
	}
	recs := a.decisions()
	if len(recs) != n || n != 2*40+6 {
		t.Errorf("%d decisions recorded of %d evaluations", len(recs), n)
	}
	if string(recs[0].Input) == "" || !strings.Contains(string(recs[0].Input), `"kind":"access.evaluation","params":{"subject":{"type":"user","id":"rick@the-citadel.com","identity"`) {
		t.Errorf("%s", recs[0].Input)
	}
}

// TestAuthZENCertification: the levels Basic, Batch and Discovery of the
// published certification scenario.
func TestAuthZENCertification(t *testing.T) {
	a := authzen(t)
	q := func(subject, action, resource string) string {
		return fmt.Sprintf(`{"subject":%s,"action":%s,"resource":%s}`, subject, action, resource)
	}
	const (
		alice, bob   = `{"type":"user","id":"alice"}`, `{"type":"user","id":"bob"}`
		admin        = `{"type":"user","id":"bob","properties":{"role":"admin"}}`
		read, write  = `{"name":"read"}`, `{"name":"write"}`
		soft, hard   = `{"name":"delete","properties":{"soft":true}}`, `{"name":"delete","properties":{"soft":false}}`
		one, two     = `{"type":"record","id":"record-1"}`, `{"type":"record","id":"record-2"}`
		oneA, twoOld = `{"type":"record","id":"record-1","properties":{"status":"active"}}`, `{"type":"record","id":"record-2","properties":{"status":"archived"}}`
	)
	for range 3 { // the same request, the same decision
		a.evaluate(q(alice, read, one), true)
		a.evaluate(q(alice, write, one), true)
		a.evaluate(q(bob, read, one), true)
		a.evaluate(q(bob, write, one), false)
		a.evaluate(q(alice, write, twoOld), false)
		a.evaluate(q(admin, write, twoOld), true)
		a.evaluate(q(alice, soft, one), true)
		a.evaluate(q(alice, hard, one), false)
	}
	a.evaluate(strings.TrimSuffix(q(alice, read, one), "}")+`,"context":{"time":"2025-06-27T18:03-07:00","ip":"192.168.1.1"}}`, true)
	a.evaluate(q(`{"type":"user","id":"alice","properties":{"department":"Sales","role":"manager"}}`, `{"name":"read","properties":{"method":"GET"}}`,
		`{"type":"record","id":"record-1","properties":{"status":"active","owner":"bob"}}`), true)
	a.evaluate(strings.TrimSuffix(q(alice, read, one), "}")+`,"foo":"bar","futureField":{"nested":true}}`, true)
	before := len(a.decisions())

	for name, body := range map[string]string{
		"no subject": `{"action":` + read + `,"resource":` + one + `}`, "no action": `{"subject":` + alice + `,"resource":` + one + `}`, "no resource": `{"subject":` + alice + `,"action":` + read + `}`,
		"no subject.type": q(`{"id":"alice"}`, read, one), "no subject.id": q(`{"type":"user"}`, read, one), "no action.name": q(alice, `{}`, one),
		"no resource.type": q(alice, read, `{"id":"record-1"}`), "no resource.id": q(alice, read, `{"type":"record"}`),
		"not JSON": `{"subject":`, "empty": ``, "subject is a string": q(`"alice"`, read, one), "action.name is a number": q(alice, `{"name":123}`, one),
		"subject is null": q(`null`, read, one), "an empty id": q(`{"type":"user","id":""}`, read, one), "properties is a list": q(`{"type":"user","id":"a","properties":[]}`, read, one),
		"context is a string": strings.TrimSuffix(q(alice, read, one), "}") + `,"context":"x"}`, "an array": `[]`,
		"a duplicate key": `{"subject":` + bob + `,` + q(alice, read, one)[1:], "a duplicate id": q(`{"type":"user","id":"bob","id":"alice"}`, read, one),
		"another case": `{"Subject":` + bob + `,` + q(alice, read, one)[1:], "an id in another case": q(`{"type":"user","id":"alice","ID":"bob"}`, read, one),
	} {
		status, out := a.ask("/access/v1/evaluation", body)
		var msg string
		if err := json.Unmarshal([]byte(out), &msg); status != 400 || err != nil || msg == "" {
			t.Errorf("%s: %d %s, want 400 and a message", name, status, out)
		}
	}
	if resp, _ := a.request("POST", "/access/v1/evaluation", "Content-Type: text/plain\r\n", q(alice, read, one)); resp.StatusCode != 400 {
		t.Errorf("text/plain: %d", resp.StatusCode)
	}
	if n := len(a.decisions()); n != before {
		t.Errorf("%d decisions of requests that are none", n-before)
	}
	resp, _ := a.request("POST", "/access/v1/evaluation", jsonType+"X-Request-ID: bfe9eb29\r\n", q(alice, read, one))
	if resp.Header.Get("X-Request-ID") != "bfe9eb29" {
		t.Errorf("the request id does not come back: %v", resp.Header)
	}
	resp, _ = a.request("POST", "/access/v1/evaluation", jsonType+"X-Request-ID: bfe9eb29\r\n", "{")
	if resp.StatusCode != http.StatusBadRequest || resp.Header.Get("X-Request-ID") != "bfe9eb29" {
		t.Errorf("%d %v", resp.StatusCode, resp.Header)
	}

	// Batch.
	defaults := `{"subject":` + alice + `,"action":` + read + `,`
	a.evaluateAll(defaults+`"evaluations":[{"resource":`+one+`},{"resource":`+two+`}]}`, true, true)
	a.evaluateAll(`{"subject":`+bob+`,"resource":`+one+`,"evaluations":[{"action":`+read+`},{"action":`+write+`}]}`, true, false)
	a.evaluateAll(`{"subject":`+alice+`,"action":`+write+`,"evaluations":[{"resource":`+oneA+`},{"resource":`+twoOld+`}]}`, true, false)
	a.evaluateAll(`{"action":`+write+`,"resource":`+twoOld+`,"evaluations":[{"subject":`+alice+`},{"subject":`+admin+`}]}`, false, true)
	a.evaluateAll(`{"evaluations":[`+q(alice, read, one)+`,`+q(bob, write, one)+`]}`, true, false)
	a.evaluateAll(defaults+`"context":{"time":"t1"},"evaluations":[{"resource":`+one+`},{"resource":`+two+`,"context":{"time":"t2"}}]}`, true, true)
	// A required member that an entity lacks comes from its default.
	a.evaluateAll(`{"subject":`+alice+`,"action":`+write+`,"resource":{"type":"record"},"evaluations":[{"resource":{"id":"record-1","properties":{"status":"active"}}},{"resource":`+twoOld+`}]}`, true, false)
	a.evaluateAll(`{"subject":`+alice+`,"action":`+read+`,"resource":`+one+`,"evaluations":[{"resource":{}},{"resource":{ "type":"x"}}]}`, true, false)
	// An evaluation that is none is denied alone.
	a.evaluateAll(defaults+`"evaluations":[{"resource":`+one+`},{},{"resource":"x"},7]}`, true, false, false, false)
	for _, body := range []string{q(alice, read, one), strings.TrimSuffix(q(alice, read, one), "}") + `,"evaluations":[]}`} {
		if status, out := a.ask("/access/v1/evaluations", body); status != 200 || !strings.HasPrefix(out, `{"decision":true`) {
			t.Errorf("%s: %d %s", body, status, out)
		}
	}
	// Semantics: what is left out is not evaluated.
	three := `"evaluations":[{"action":` + read + `},{"action":` + write + `},{"action":` + read + `}]}`
	head := `{"subject":` + bob + `,"resource":` + one + `,"options":{"evaluations_semantic":`
	before = len(a.decisions())
	a.evaluateAll(head+`"execute_all"},`+three, true, false, true)
	a.evaluateAll(head+`"deny_on_first_deny","other":1},`+three, true, false)
	a.evaluateAll(head+`"permit_on_first_permit"},`+three, true)
	if n := len(a.decisions()) - before; n != 6 {
		t.Errorf("%d evaluations, want 6", n)
	}
	for name, body := range map[string]string{
		"an unknown semantic": head + `"first"},` + three, "a semantic of another type": head + `1},` + three, "options of another type": `{"options":1,` + three,
		"evaluations of another type": `{"evaluations":{"1":{}}}`, "too many": `{"evaluations":[` + strings.Repeat("{},", 64) + `{}]}`,
		"defaults that multiply": `{"subject":{"type":"user","id":"` + strings.Repeat("x", 2000) + `"},` + `"evaluations":[` + strings.Repeat("{},", 31) + `{}]}`,
	} {
		if status, out := a.ask("/access/v1/evaluations", body); status != 400 {
			t.Errorf("%s: %d %s", name, status, out)
		}
	}

	// Discovery.
	resp, out := a.request("GET", "/.well-known/authzen-configuration", "", "")
	base := "http://" + a.addr
	if want := fmt.Sprintf(`{"policy_decision_point":%q,"access_evaluation_endpoint":%q,"access_evaluations_endpoint":%q}`, base, base+"/access/v1/evaluation", base+"/access/v1/evaluations"); resp.StatusCode != 200 ||
		strings.TrimSpace(out) != want || resp.Header.Get("Content-Type") != "application/json" {
		t.Errorf("%d %s", resp.StatusCode, out)
	}
	if status, _ := a.ask("/access/v1/search/subject", "{}"); status != 404 {
		t.Errorf("search: %d", status)
	}
}
