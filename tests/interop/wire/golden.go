package wire

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/pmezard/go-difflib/difflib"
)

// UpdateVariable makes the tests write the recordings' files anew instead of comparing with them.
const UpdateVariable = "UPDATE_GOLDEN"

// Compare fails the test when the recording is not what the file of that name in testdata has.
func (r *Recording) Compare(name string) {
	r.t.Helper()
	compare(r.t, filepath.Join("testdata", name+".golden"), r.Text())
}

func compare(t testing.TB, path, text string) {
	t.Helper()
	if os.Getenv(UpdateVariable) != "" {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(want) == text {
		return
	}
	difference, err := difflib.GetUnifiedDiffString(difflib.UnifiedDiff{
		A: difflib.SplitLines(string(want)), B: difflib.SplitLines(text),
		FromFile: path, ToFile: "recorded", Context: 6,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Errorf("the wire has changed; if it was meant to, run with %s=1 and review the difference:\n%s",
		UpdateVariable, difference)
}
