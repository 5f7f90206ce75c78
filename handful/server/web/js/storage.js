// What a browser keeps for this page. One that is told to keep nothing throws: then it is kept while the page is open.

const here = new Map();

const storage = (of) => ({
  get(name) {
    try {
      return of().getItem(name);
    } catch {
      return here.get(name) ?? null;
    }
  },
  set(name, value) {
    try {
      of().setItem(name, value);
    } catch {
      here.set(name, value);
    }
  },
});

/** For the next visits. */
export const visits = storage(() => localStorage);

/** For this tab alone. */
export const tab = storage(() => sessionStorage);
