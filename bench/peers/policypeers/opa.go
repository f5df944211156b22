package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/metrics"
	"github.com/open-policy-agent/opa/v1/rego"
	"github.com/open-policy-agent/opa/v1/storage/inmem"
	"github.com/open-policy-agent/opa/v1/topdown"
	"github.com/open-policy-agent/opa/v1/util"

	"github.com/autonomyops/autonomy/bench/peers/policyleg"
)

// read returns the policy's text and its data.
func read(dir string) (module string, data map[string]any, err error) {
	text, err := os.ReadFile(filepath.Join(dir, "policy.rego"))
	if err != nil {
		return "", nil, err
	}
	raw, err := os.ReadFile(filepath.Join(dir, "data.json"))
	if err != nil {
		return "", nil, err
	}
	return string(text), data, util.UnmarshalJSON(raw, &data)
}

// plain is OPA as its guide shows it: what most programs do.
type plain struct{ query rego.PreparedEvalQuery }

func openPlain(dir string) (leg.Policy, error) {
	module, data, err := read(dir)
	if err != nil {
		return nil, err
	}
	q, err := rego.New(rego.Query("data.autonomy.decision"), rego.Module("policy.rego", module), rego.Store(inmem.NewFromObject(data))).
		PrepareForEval(context.Background())
	return plain{q}, err
}

func (p plain) Decider() leg.Decider {
	return func(dst, input []byte) ([]byte, error) {
		var in any
		if err := json.Unmarshal(input, &in); err != nil {
			return dst, err
		}
		rs, err := p.query.Eval(context.Background(), rego.EvalInput(in))
		if err != nil {
			return dst, err
		}
		if len(rs) != 1 {
			return dst, errors.New("the policy gives no answer")
		}
		answer, err := json.Marshal(rs[0].Expressions[0].Value)
		return append(dst, answer...), err
	}
}

// best is OPA with what makes it fastest: data kept as its evaluator's values,
// one read transaction for ever, no metrics, no goroutine for the cancellation,
// the input parsed into values and the answer taken as one.
type best struct {
	query   rego.PreparedEvalQuery
	options []rego.EvalOption
}

func openBest(dir string) (leg.Policy, error) {
	ctx := context.Background()
	module, data, err := read(dir)
	if err != nil {
		return nil, err
	}
	store := inmem.NewFromObjectWithOpts(data, inmem.OptRoundTripOnWrite(false), inmem.OptReturnASTValuesOnRead(true))
	txn, err := store.NewTransaction(ctx)
	if err != nil {
		return nil, err
	}
	q, err := rego.New(rego.Query("data.autonomy.decision"), rego.Module("policy.rego", module), rego.Store(store), rego.Transaction(txn)).
		PrepareForEval(ctx)
	if err != nil {
		return nil, err
	}
	return best{q, []rego.EvalOption{
		rego.EvalTransaction(txn), rego.EvalMetrics(metrics.NoOp()),
		rego.EvalGenerateJSON(func(t *ast.Term, _ *rego.EvalContext) (any, error) { return t.Value, nil }),
	}}, nil
}

func (b best) Decider() leg.Decider {
	return func(dst, input []byte) ([]byte, error) {
		in, err := ast.ValueFromReader(bytes.NewReader(input))
		if err != nil {
			return dst, err
		}
		rs, err := b.query.Eval(context.Background(), append(b.options[:len(b.options):len(b.options)],
			rego.EvalParsedInput(in), rego.EvalExternalCancel(topdown.NewCancel()))...)
		if err != nil {
			return dst, err
		}
		if len(rs) != 1 {
			return dst, errors.New("the policy gives no answer")
		}
		v, ok := rs[0].Expressions[0].Value.(ast.Value)
		if !ok {
			return dst, fmt.Errorf("%T is no value", rs[0].Expressions[0].Value)
		}
		return appendValue(dst, v), nil
	}
}

// appendValue encodes what decisions are made of.
func appendValue(dst []byte, v ast.Value) []byte {
	list := func(n int, each func(func(*ast.Term))) []byte {
		dst = append(dst, '[')
		each(func(t *ast.Term) { dst = append(appendValue(dst, t.Value), ',') })
		if n > 0 {
			dst = dst[:len(dst)-1]
		}
		return append(dst, ']')
	}
	switch v := v.(type) {
	case ast.Boolean:
		return strconv.AppendBool(dst, bool(v))
	case ast.Number:
		return append(dst, v...)
	case ast.String:
		return strconv.AppendQuote(dst, string(v)) // the texts here need nothing that JSON writes otherwise
	case *ast.Array:
		return list(v.Len(), v.Foreach)
	case ast.Set:
		return list(v.Len(), v.Foreach)
	case ast.Object:
		dst = append(dst, '{')
		v.Foreach(func(k, x *ast.Term) {
			dst = append(appendValue(dst, k.Value), ':')
			dst = append(appendValue(dst, x.Value), ',')
		})
		if v.Len() > 0 {
			dst = dst[:len(dst)-1]
		}
		return append(dst, '}')
	}
	return append(dst, "null"...)
}
