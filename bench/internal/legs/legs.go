// Package legs runs the legs of a benchmark: each is a process of its own, which
// gets its task as JSON in one argument and prints its result as JSON.
package legs

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"time"
)

// Order is the order of sides in repetition rep: reversed in every other one, so
// that a slow moment of the machine does not always hit the same side.
func Order[S any](sides []S, rep int) []S {
	order := slices.Clone(sides)
	if rep%2 == 1 {
		slices.Reverse(order)
	}
	return order
}

// Run starts program, a path and arguments, with spec behind them, and reads its
// result. It is killed after limit.
func Run[R any](ctx context.Context, program []string, spec any, limit time.Duration) (res R, err error) {
	arg, err := json.Marshal(spec)
	if err != nil {
		return res, err
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, program[0], append(slices.Clone(program[1:]), string(arg))...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return res, fmt.Errorf("%s: %w\n%.2000s", filepath.Base(program[0]), errors.Join(context.Cause(ctx), err), stderr.Bytes())
	}
	dec := json.NewDecoder(&stdout)
	dec.DisallowUnknownFields()
	if err := dec.Decode(&res); err != nil {
		return res, fmt.Errorf("%s answered what is not a result (build it anew): %w", filepath.Base(program[0]), err)
	}
	return res, nil
}
