package prepared

import (
	"context"
	"fmt"
	"sync"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/storage"
	"github.com/open-policy-agent/opa/v1/util"

	"github.com/autonomyops/autonomy/prepared/irvm"
)

// dataStore gives OPA's interpreter the data that the compiled engine holds, so
// that a program that needs the interpreter now and then does not hold its data
// twice. What is read is converted then. Nothing is ever written.
type dataStore struct {
	data irvm.Value

	mu   sync.Mutex
	made map[string]ast.Value // large collections, by path

	storage.WritesNotSupported
	storage.PolicyNotSupported
	storage.TriggersNotSupported
}

// Collections of so many members are converted once, so many of them.
const (
	largeCollection  = 64
	largeCollections = 16
)

// readOnly is a transaction of which there is only one kind.
type readOnly struct{}

func (readOnly) ID() uint64 { return 0 }

func (s *dataStore) NewTransaction(context.Context, ...storage.TransactionParams) (storage.Transaction, error) {
	return readOnly{}, nil
}

func (s *dataStore) Commit(context.Context, storage.Transaction) error { return nil }
func (s *dataStore) Abort(context.Context, storage.Transaction)        {}

func (s *dataStore) Truncate(context.Context, storage.Transaction, storage.TransactionParams, storage.Iterator) error {
	return &storage.Error{Code: storage.WritesNotSupportedErr, Message: "a policy's data does not change"}
}

func (s *dataStore) Read(_ context.Context, _ storage.Transaction, path storage.Path) (any, error) {
	v := s.data
	for _, name := range path {
		switch v.Kind() {
		case irvm.Object:
			v = v.Get(name)
		case irvm.Array:
			i, ok := util.Atoi(name)
			if !ok {
				i = -1
			}
			v = v.Index(i)
		default:
			v = irvm.Value{}
		}
		if v.Kind() == irvm.Undefined {
			return nil, &storage.Error{Code: storage.NotFoundErr, Message: fmt.Sprintf("%v: document does not exist", path)}
		}
	}
	if v.Len() < largeCollection {
		return v.AST(), nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	key := path.String()
	if known, ok := s.made[key]; ok {
		return known, nil
	}
	if s.made == nil || len(s.made) >= largeCollections {
		s.made = map[string]ast.Value{}
	}
	s.made[key] = v.AST()
	return s.made[key], nil
}
